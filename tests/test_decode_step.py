"""What a decode step runs of a pruned graph: it has no visual token, and a GPU waits for each copy.

CUDA's kernels of ONNX Runtime refuse to reduce an axis without elements, which the CPU's do.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from edgeprune import policies
from edgeprune.bundle import Bundle
from edgeprune.errors import SpecError
from edgeprune.lowering import DTYPES
from tests.frozen import frozen
from tests.graphs import SIZES

REDUCING = {"ArgMax", "ArgMin", "CumSum", "LogSoftmax", "Softmax"}
QUICK = ("polymorphic", "sparsevlm", "visiontrim")
CAPACITY = 64


@pytest.mark.parametrize("method", QUICK)
def test_no_step_reduces_an_axis_without_elements(
    method: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    bundle = frozen(tmp_path / method, method, 1.3, model=tiny_checkpoint, target="cuda")
    assert _empty_reductions(bundle) == []


@pytest.mark.slow
@pytest.mark.parametrize("method", policies.names())
def test_no_step_of_the_demo_reduces_an_axis_without_elements(method: str, tmp_path: Path) -> None:
    try:
        bundle = frozen(tmp_path / method, method, 1 if method == "none" else 4, target="cuda")
    except SpecError as error:
        pytest.skip(str(error))
    assert _empty_reductions(bundle) == []


def _empty_reductions(bundle: Path) -> list[str]:
    """Nodes of a decode step that reduce an axis of no elements."""
    model = onnx.load(bundle / "decoder.onnx", load_external_data=False)
    nodes = [n for n in model.graph.node if n.op_type in REDUCING or n.op_type[:6] == "Reduce"]
    ends = {value.name for value in (*model.graph.input, *model.graph.output)}
    shown = {node.input[0] for node in nodes} - ends
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(shown))
    onnx.save(model, bundle / "shown.onnx")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(bundle / "shown.onnx", options, ["CPUExecutionProvider"])
    feeds = _step(bundle)
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(None, feeds), strict=True)) | feeds
    return [n.name for n in nodes if 0 in _reduced(n, found[n.input[0]].shape, model)]


def _step(bundle: Path) -> dict[str, np.ndarray]:
    """Inputs of a decode step on empty caches."""
    open_sizes = {"prefix": 0, "visual": 0, "text": 1}
    feeds = {}
    for tensor in Bundle.open(bundle).manifest.graph.inputs:
        sizes = [d if isinstance(d, int) else open_sizes.get(d, CAPACITY) for d in tensor.dims]
        dtype = np.dtype(DTYPES[tensor.dtype].stored if tensor.dtype in DTYPES else tensor.dtype)
        feeds[tensor.name] = np.zeros(sizes, dtype)
    return feeds


def _reduced(node: onnx.NodeProto, shape: tuple[int, ...], model: onnx.ModelProto) -> list[int]:
    """Sizes of the axes that a node reduces."""
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type in REDUCING:
        return [shape[attributes.get("axis", -1)]]
    if len(node.input) < 2:
        return [*shape]
    constants = {n.output[0]: n.attribute[0].t for n in model.graph.node if n.op_type == "Constant"}
    constants |= {tensor.name: tensor for tensor in model.graph.initializer}
    axes = onnx.numpy_helper.to_array(constants[node.input[1]])
    return [shape[axis] for axis in np.atleast_1d(axes)]


def test_sizes_reach_a_gpu_in_few_copies(demo_utp: Path) -> None:
    """Sizes are computed on the host; each that a tensor on the GPU meets is a copy and a wait.

    ONNX Runtime computes on the host whatever follows from sizes, constants and inputs alone.
    """
    graph = onnx.load(demo_utp / "decoder.onnx", load_external_data=False).graph
    fixed = {tensor.name for tensor in graph.initializer}
    fixed |= {name for n in graph.node if n.op_type == "Constant" for name in n.output}
    inputs = {value.name for value in graph.input}
    host, copied = set[str](), set[str]()
    for node in graph.node:
        rest = [name for name in node.input if name and name not in fixed]
        sizes = host.intersection(rest) and host.issuperset({*rest} - inputs)
        if node.op_type == "Shape" or (sizes and node.op_type != "Range"):
            host.update(node.output)
            continue
        taken = SIZES.get(node.op_type, [])
        copied |= {name for i, name in enumerate(node.input) if name in host and i not in taken}
    assert len(copied) <= 4, copied
