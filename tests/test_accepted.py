"""Every family's graphs on every GPU target: `check` accepts them, TensorRT-RTX compiles them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgeprune.lowering import TARGETS
from tests.engines import assert_accepted
from tests.frozen import frozen
from tests.test_every_family import LLAVAS, PRUNED, QWENS

CHECKPOINTS: dict[str, Callable[[Path], object]] = {
    **{name: lambda folder, make=make: make().save(folder) for name, make in LLAVAS.items()},
    **QWENS,
}
QUICK = [
    (name, "utp", target)
    for name in ("qwen2_5_vl", "qwen3_vl")
    for target in ("jetpack7", "jetpack6")
]
"""Positions of three axes: the other decoders are alike."""
CASES = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for name in CHECKPOINTS
    for method in ("none", "utp")
    for target in TARGETS
    if target != "cpu"
    for case in [(name, method, target)]
]


@pytest.mark.parametrize(("family", "method", "target"), CASES)
def test_engines_take_a_family(family: str, method: str, target: str, tmp_path: Path) -> None:
    """Those of the dense model, and of UTP's at CR 2."""
    CHECKPOINTS[family](tmp_path / "tiny")
    asked = next(case.asked for case in PRUNED if case.family == family)
    options = {"model": tmp_path / "tiny", "target": target, "dtype": "fp16", **asked}
    bundle = frozen(tmp_path / "b", method, 2 if method == "utp" else 1, **options)
    assert_accepted(bundle, target, 64)
