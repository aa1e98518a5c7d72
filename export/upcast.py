"""A half-precision graph in float32, its weights still rounded.

ONNX Runtime's CPU provider has no bf16 kernels and keeps float32 between many fp16 nodes. The
widened graph has the same nodes, so it shows whether structure and weights are right, with nothing
left to rounding. Weights stay in their file as they are: a Cast widens each where it is read.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
STORED = "/stored"
"""Behind the name of a weight, of what is in its file."""


def upcast(model: Any) -> None:
    """Let a graph, an onnx.ModelProto without its weights, compute in float32."""
    graph, casts = model.graph, []
    for value in (*graph.input, *graph.output):
        _widen(value.type.tensor_type)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i in HALF:  # of Cast
                attribute.i = TensorProto.FLOAT
            elif attribute.HasField("t") and attribute.t.data_type in HALF:
                wide = numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(numpy_helper.from_array(wide, attribute.t.name))
    del graph.value_info[:]
    half = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type in HALF}
    for node in list(graph.node):
        if node.op_type == "Gather" and node.input[0] in half:  # a few rows of a large table
            read = f"{node.output[0]}{STORED}"
            casts.append((node, _cast(read, node.output[0])))
            node.input[0], node.output[0] = f"{node.input[0]}{STORED}", read
    for name, tensor in half.items():
        tensor.name = f"{name}{STORED}"
    nodes = [_cast(f"{name}{STORED}", name) for name in half]
    after = {id(node): cast for node, cast in casts}
    for node in graph.node:
        nodes += [node, after[id(node)]] if id(node) in after else [node]
    replace_nodes(graph, nodes)


def replace_nodes(graph: Any, nodes: list[Any]) -> None:
    """Give a graph other nodes."""
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _cast(name: str, output: str) -> Any:
    return helper.make_node("Cast", [name], [output], name=f"{output}/cast", to=TensorProto.FLOAT)


def _widen(kind: Any) -> None:
    if kind.elem_type in HALF:
        kind.elem_type = TensorProto.FLOAT
