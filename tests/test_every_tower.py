"""Every tower with every method of the encoder, from checkpoint to engine: minutes long.

    pytest -m slow tests/test_every_tower.py -k qwen2_5_vl

Graphs equal their eager references and have no size that depends on the image, `check` finds
nothing in them for either JetPack, and TensorRT-RTX compiles them.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from edgeprune import encoder_methods
from edgeprune.bundle import Bundle
from edgeprune.cli import main
from tests.encoder_sites import STAYS, TOWERS, bundle
from tests.engines import assert_accepted

pytestmark = pytest.mark.slow

CASES = [
    (name, method)
    for name in TOWERS
    for method in encoder_methods.names()
    if not (method == "drop" and name in STAYS)
]
OPEN = {"NonZero", "Compress", "Unique", "NonMaxSuppression", "Loop", "If", "Scan"}
"""Operators whose results have sizes that depend on values, or that do not run always."""


@pytest.mark.parametrize(("name", "method"), CASES)
@pytest.mark.parametrize("target", ["jetpack7", "jetpack6"])
def test_engines_take_every_tower(name: str, method: str, target: str, tmp_path: Path) -> None:
    adapter = TOWERS[name](tmp_path / "tiny")
    first, text = target == "jetpack7", f"{method}:at=1:keep=0.4"
    made = bundle(adapter, text, tmp_path, target=target, samples=2 * first)
    assert (made.manifest.parity.samples, made.manifest.parity.ties) == (2 * first, 0)
    for graph in made.manifest.graphs:
        assert not _open_sizes(made, graph)
    assert_accepted(made.path, target)
    if first:
        assert main(["build", str(made.path), "--backend", "trt-rtx", "--text-capacity", "64"]) == 0


def _open_sizes(made: Bundle, graph: str) -> list[str]:
    """What of a graph has a size that is known only when it runs; of a decoder's, which takes any
    number of text tokens, operators alone are looked at."""
    model = onnx.load(made.file(graph), load_external_data=False)
    found = sorted({node.op_type for node in model.graph.node} & OPEN)
    if graph == "decoder.onnx":
        return found
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    dims = ((v.name, d) for v in values for d in v.type.tensor_type.shape.dim)
    return found + [name for name, dim in dims if not dim.HasField("dim_value")]
