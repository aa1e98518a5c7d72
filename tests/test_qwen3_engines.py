"""Qwen3-VL on GPU targets: `check` accepts its graphs, TensorRT-RTX compiles them."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeprune.lowering import TARGETS
from tests.engines import assert_accepted
from tests.frozen import frozen
from tests.qwen import stacked_checkpoint

slow = pytest.mark.slow
GPUS = [target for target in TARGETS if target not in ("cpu", "rtx")]
CASES = [
    ("utp", 2, "rtx", "fp16"),
    pytest.param("none", 1, "rtx", "fp16", marks=slow),
    pytest.param("utp", 2, "rtx", "bf16", marks=slow),
    *[pytest.param("none", 1, target, "fp16", marks=slow) for target in GPUS],
    *[pytest.param("utp", 2, target, "fp16", marks=slow) for target in GPUS],
]


@pytest.mark.parametrize(("method", "cr", "target", "dtype"), CASES)
def test_engines_take_it(method: str, cr: float, target: str, dtype: str, tmp_path: Path) -> None:
    """196 tokens of 448 x 448, the default; UTP drops them between the first layers too."""
    checkpoint = stacked_checkpoint(tmp_path / "tiny")
    bundle = frozen(tmp_path / "b", method, cr, model=checkpoint, target=target, dtype=dtype)
    assert_accepted(bundle, target)
