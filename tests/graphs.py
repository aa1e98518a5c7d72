"""What a graph's sizes follow from."""

from __future__ import annotations

import onnx

NEVER = {
    "Compress",
    "If",
    "Loop",
    "NonZero",
    "Scan",
    "ScatterElements",
    "ScatterND",
    "SequenceAt",
    "Unique",
}
"""Operators of sizes that data decide, of control flow, and two that engines read differently."""

SIZES = {
    "TopK": [1],
    "Reshape": [1],
    "Expand": [1],
    "Slice": [1, 2, 3, 4],
    "Range": [0, 1, 2],
    "ConstantOfShape": [0],
    "Tile": [1],
    "Split": [1],
    "Pad": [1],
    "OneHot": [1],
}
"""Which inputs of an operator decide the sizes of what it gives."""


def sized_by_data(graph: onnx.GraphProto) -> list[str]:
    """Nodes with a size, K of TopK among them, that follows from more than constants and shapes."""
    fixed = {"", *(constant.name for constant in graph.initializer)}
    found = []
    for node in graph.node:
        sizes = [node.input[i] for i in SIZES.get(node.op_type, []) if i < len(node.input)]
        if not fixed.issuperset(sizes):
            found.append(node.name)
        if node.op_type in ("Shape", "Constant") or fixed.issuperset(node.input):
            fixed.update(node.output)
    return found
