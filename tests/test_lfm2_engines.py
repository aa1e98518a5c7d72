"""LFM2-VL on GPU targets: `check` accepts its graphs, TensorRT-RTX compiles them."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeprune.bundle import Bundle
from edgeprune.cli import main
from edgeprune.lowering import TARGETS
from edgeprune.tiling import Size
from tests import lfm2
from tests.conftest import instruct_records
from tests.engines import assert_accepted
from tests.frozen import frozen

pytestmark = pytest.mark.slow
CASES = [
    ("none", 1, "rtx", "fp16"),
    ("utp", 4, "rtx", "fp16"),
    ("utp", 4, "rtx", "bf16"),
    *[
        (method, cr, target, "fp16")
        for target in TARGETS
        if target not in ("cpu", "rtx")
        for method, cr in (("none", 1), ("utp", 4))
    ],
]


TILES = [(*case, lfm2.SPLIT[0]) for case in CASES if case[0] == "none"]
"""With padding beside the view of the whole, which attention is told of."""


@pytest.mark.parametrize(
    ("method", "cr", "target", "dtype", "size"),
    [*[(*case, Size(60, 100)) for case in CASES], *TILES, ("utp", 4, "rtx", "bf16", TILES[0][-1])],
)
def test_engines_take_it(
    method: str, cr: float, target: str, dtype: str, size: Size, tmp_path: Path
) -> None:
    """The layers of the published models; heads of 32, the least that attention kernels have."""
    sizes = {"hidden_size": 128, "max_position_embeddings": 2048}
    checkpoint = lfm2.lfm2_vl(lfm2.PUBLISHED, **sizes).save(tmp_path / "tiny")
    options = {"model": checkpoint, "size": size, "target": target, "dtype": dtype}
    bundle = frozen(tmp_path / "b", method, cr, **options)
    assert_accepted(bundle, target)


@pytest.mark.parametrize(
    ("target", "weights"),
    [("cpu", "int4:awq=on"), ("cpu", "int4:round=gptq"), ("rtx", "int4:vision=on:embedding=on")],
)
def test_its_products_have_four_bits(target: str, weights: str, tmp_path: Path) -> None:
    """Those of convolutions too; parity is with the eager model of the same codes."""
    kinds = "conv", "full_attention"
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
    checkpoint = lfm2.lfm2_vl(kinds, **sizes).save(tmp_path / "tiny")
    options = ["--model", checkpoint, "--method", "none", "--image-size", "100x60", "--parity", 1]
    options += ["--samples-file", instruct_records(tmp_path), "--samples", 2]
    command = ["export", *options, "--target", target, "--weights", weights]
    assert main([*map(str, command), "-o", str(tmp_path / "b")]) == 0
    record = Bundle.open(tmp_path / "b").manifest.weights
    assert record is not None and record.tensors["int4"] >= 5 + 7 + 1  # and the head
