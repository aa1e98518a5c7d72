"""Every method's graphs are compiled by TensorRT-RTX, prefill and decode in one engine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine_size import stepped, weights
from benchmarks.schedules import declining
from benchmarks.shapes import SHAPES, write
from edgeprune import policies
from edgeprune.errors import SpecError
from tests.engines import compiled
from tests.frozen import frozen

CODE = {"cdpruner": 1.16, "polymorphic": 1.08, "sparsevlm": 1.08}
"""Engines of the 0.5B shape over their weights, where choosing is more code than 5% of them."""
QUICK = [("trimtokenator", "fp16"), ("visionzip", "bf16"), ("fastv", "bf16")]
"""A greedy choice by the text, merged tokens, a choice between layers: of the tiny checkpoint."""


@pytest.mark.parametrize(("method", "dtype"), QUICK, ids=[m for m, _ in QUICK])
def test_a_method_compiles(method: str, dtype: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = frozen(tmp_path / "b", method, 1.4, model=tiny_checkpoint, target="rtx", dtype=dtype)
    compiled(bundle)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("cr", [4, 16])
@pytest.mark.parametrize("method", policies.names())
def test_the_demo_compiles_with_every_method(
    method: str, cr: float, dtype: str, tmp_path: Path
) -> None:
    if method == "none" and cr > 4:
        pytest.skip("the dense model has one ratio")
    try:
        frozen(tmp_path / "b", method, 1 if method == "none" else cr, target="rtx", dtype=dtype)
    except SpecError as error:
        pytest.skip(f"not a ratio of this method: {error}")
    compiled(tmp_path / "b")


HALF_A_BILLION = [
    *[
        (method, cr, "rtx", dtype)
        for method, cr in [("none", 1), ("utp", 4), ("utp", 16)]
        for dtype in ("fp16", "bf16")
    ],
    *[
        (method, cr, target, "fp16")
        for method, cr in [("none", 1), ("utp", 4)]
        for target in ("jetpack7", "jetpack6")
    ],
    *[(name, 4, "rtx", "fp16") for name in policies.names() if name not in ("none", "utp")],
]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "cr", "target", "dtype"), HALF_A_BILLION)
def test_a_decoder_of_half_a_billion_compiles(
    method: str,
    cr: float,
    target: str,
    dtype: str,
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
) -> None:
    """24 layers, 576 visual tokens. Its weights are in the engine once, and code is little."""
    checkpoint = tmp_path_factory.getbasetemp() / "0.5b"
    if not checkpoint.is_dir():
        write(SHAPES["0.5b"], checkpoint)
    sites = {"counts": stepped(declining(SHAPES["0.5b"].patches, 24, cr), 4)}
    settings: dict[str, Any] = sites if method == "utp" else {}
    try:
        bundle = frozen(
            tmp_path / "b", method, cr, model=checkpoint, target=target, dtype=dtype, **settings
        )
        engine = compiled(bundle)["decoder"]
        most = CODE.get(method, 1.05) if target == "rtx" else 1.5
        assert engine["bytes"] < most * weights(bundle / "decoder.onnx")
    finally:
        shutil.rmtree(tmp_path)  # 2.5 GB a case
