"""A graph with all its codes and scales, whose products have inputs that are not rounded.

Rounding to 8 bits can turn a difference in the last digit into a difference of a whole step. So two
engines agree to the last digits only without it. What this rounding costs is measured separately
(weighing.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from onnx import helper

from edgeprune.export.upcast import replace_nodes


def without_rounding(model: Any) -> None:
    """Let no product of a graph, an onnx.ModelProto without its weights, round its inputs."""
    units = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    nodes = [made for node in model.graph.node for made in _unrounded(node, units)]
    replace_nodes(model.graph, nodes)


def _unrounded(node: Any, units: dict[str, str]) -> Iterator[Any]:
    """What stands for a node; `units` are what was rounded, by its codes."""
    if node.op_type == "MatMulNBits":
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    if node.op_type == "MatMulIntegerToFloat":
        codes, weights, _, scales, _ = node.input
        floats = f"{weights}/float"
        yield helper.make_node("DequantizeLinear", [weights, scales], [floats], axis=1)
        yield helper.make_node("MatMul", [units[codes], floats], node.output)
    elif node.op_type == "DequantizeLinear" and node.input[0] in units:
        yield helper.make_node("Identity", [units[node.input[0]]], node.output)
    elif node.op_type != "QuantizeLinear":
        yield node
