"""Graph passes: each does one thing, `clean` runs them in order."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer

HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def clean(model: ir.Model, weights: Collection[str]) -> None:
    """BlockMerge constants, merge equal nodes, drop dead ones, give the rest readable names.

    What is computed from one of `weights` is no constant yet: a stand-in of zeros is traced. What
    rounds a constant stays a node, so that the constant is not lost; see `models._ops.scalar`.
    """

    def foldable(node: ir.Node) -> bool | None:
        weighted = any(v is not None and v.name in weights for v in node.inputs)
        return False if weighted or _rounds(node) else None

    common.InlinePass()(model)
    optimizer.fold_constants(model, onnx_shape_inference=False, should_fold=foldable)
    widen_choices(model.graph)
    drop_idle(model.graph)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    name_nodes(model)
    for node in model.graph:
        node.metadata_props.clear()


LARGEST = float(np.finfo(np.float32).max)


def _rounds(node: ir.Node) -> bool:
    """Whether a node casts to half precision."""
    return node.op_type == "Cast" and node.attributes["to"].as_int() in HALF


def add_token(graph: ir.Graph) -> None:
    """A second output `token` int64 [1, 1]: the likeliest of the logits, of equal ones the first,
    or -1 where any of them is infinite or not a number.

    A GPU then returns 8 bytes a step instead of the whole vocabulary's logits. Engines
    differ in what ArgMax and Max do with numbers that are not finite. The sum of all magnitudes is
    not finite where one of them is not, on every engine.
    """
    (logits,) = (value for value in graph.outputs if value.name == "logits")
    token = ir.val("token", ir.DataType.INT64, [1, 1])
    last = ir.tensor([-1], dtype=ir.DataType.INT64)
    made = [
        axis := ir.node("Constant", [], {"value": last}, name="token/last"),
        most := ir.node("Constant", [], {"value": ir.tensor(LARGEST)}, name="token/largest"),
        best := ir.node("ArgMax", [logits], {"axis": -1, "keepdims": 0}, name="token/argmax"),
        wide := ir.node("Cast", [logits], {"to": ir.DataType.FLOAT}, name="token/cast"),
        total := ir.node(
            "ReduceL1", [*wide.outputs, *axis.outputs], {"keepdims": 0}, name="token/reducel1"
        ),
        finite := ir.node("LessOrEqual", [*total.outputs, *most.outputs], name="token/finite"),
        ir.node(
            "Where",
            [*finite.outputs, *best.outputs, *axis.outputs],
            outputs=[token],
            name="token/where",
        ),
    ]
    graph.extend(made)
    graph.outputs.insert(1, token)


def widen_choices(graph: ir.Graph) -> None:
    """Give ArgMax and ArgMin over a vector a second axis: TensorRT wants two."""
    chosen = [node for node in graph if node.op_type in ("ArgMax", "ArgMin")]
    for node in chosen:
        scores, found = node.inputs[0], node.outputs[0]
        if scores is None or scores.shape is None or len(scores.shape) != 1:
            continue
        first = ir.node("Constant", [], {"value": ir.tensor([0], dtype=ir.DataType.INT64)})
        widened = ir.node("Unsqueeze", [scores, first.outputs[0]])
        narrowed = ir.node("Squeeze", [found, first.outputs[0]])
        for made in (first, widened, narrowed):
            made.metadata_props.update(node.metadata_props)
        narrowed.outputs[0].shape, narrowed.outputs[0].type = found.shape, found.type
        for user, index in [use for use in found.uses() if use[0] is not narrowed]:
            user.replace_input_with(index, narrowed.outputs[0])
        node.replace_input_with(0, widened.outputs[0])
        node.attributes["axis"] = ir.AttrInt64("axis", 1)
        found.shape = None
        graph.insert_before(node, [first, widened])
        graph.insert_after(node, narrowed)


def drop_idle(graph: ir.Graph) -> None:
    """Drop casts to the dtype that a value has, and reshapes of a vector to a vector."""
    for node in list(graph):
        value = node.inputs[0] if node.inputs else None
        if value is None or not (_recasts(node, value) or _flattens(node, value)):
            continue
        ir.convenience.replace_all_uses_with(node.outputs[0], value)
        graph.remove(node, safe=True)


def _recasts(node: ir.Node, value: ir.Value) -> bool:
    return node.op_type == "Cast" and node.attributes["to"].as_int() == value.dtype


def _flattens(node: ir.Node, value: ir.Value) -> bool:
    if node.op_type != "Reshape" or value.shape is None or len(value.shape) != 1:
        return False
    shape = node.inputs[1]
    size = None if shape is None else ir.convenience.get_const_tensor(shape)
    return size is not None and size.numpy().tolist() == [-1]


def name_nodes(model: ir.Model) -> None:
    """Names like `layers.7/prune/topk`: the module that a node came from, then its operator."""
    used: Counter[str] = Counter()
    for node in model.graph:
        path = _module_path(node.metadata_props.get("namespace", ""))
        name = "/".join([*path, node.op_type.lower()])
        used[name] += 1
        node.name = name if used[name] == 1 else f"{name}.{used[name] - 1}"


def _module_path(namespace: str) -> list[str]:
    """`: a.Decoder/layers.7: b.Layer/layers.7.mlp: c.MLP/silu: aten.silu` -> [layers.7, mlp]."""
    modules = [part.partition(": ") for part in namespace.split("/")]
    names = [name for name, _, kind in modules if name and _is_module(kind)]
    if not names:
        return []
    path = re.sub(r"^prune\.(\d+)", r"layers.\1.prune", names[-1])
    return (
        re.sub(r"^((?:layers|encoder\.blocks)\.\d+)\.", r"\1/", path).replace("/", "\0").split("\0")
    )


def _is_module(kind: str) -> bool:
    return kind.startswith(("edgeprune.", "torch.nn.modules."))
