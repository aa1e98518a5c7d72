"""Every family's pruned graphs, as `check` sees them: the engines of a target take its bundles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgeprune.export.check import check_graph
from tests.frozen import frozen
from tests.test_every_family import LLAVAS, QWENS

CHECKPOINTS: dict[str, Callable[[Path], object]] = {
    **{name: lambda folder, make=make: make().save(folder) for name, make in LLAVAS.items()},
    **QWENS,
}


QUICK = ("qwen2_5_vl", "qwen3_vl")  # positions of three axes: the other decoders are alike
FAMILIES = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CHECKPOINTS
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", ["jetpack7", "jetpack6"])
def test_engines_take_a_family(family: str, target: str, tmp_path: Path) -> None:
    CHECKPOINTS[family](tmp_path / "tiny")
    bundle = frozen(tmp_path / "b", "utp", 2, model=tmp_path / "tiny", target=target, dtype="fp16")
    for graph in ("vision.onnx", "join.onnx", "decoder.onnx"):
        (verdict,) = (v for v in check_graph(bundle / graph) if target in v.target.names)
        assert not verdict.problems, verdict.problems[0].message
