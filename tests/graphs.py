"""What a graph's sizes follow from, and a fault in a graph's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import torch

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


@contextmanager
def scaled(bundle: Path, graph: str, weight: str, factor: float) -> Iterator[None]:
    """A bundle with one tensor multiplied where it is stored, until the block ends."""
    initializers = onnx.load(bundle / f"{graph}.onnx", load_external_data=False).graph.initializer
    (tensor,) = (found for found in initializers if found.name == weight)
    stored = {entry.key: entry.value for entry in tensor.external_data}
    offset, length = int(stored["offset"]), int(stored["length"])
    dtype = {1: torch.float32, 10: torch.float16, 16: torch.bfloat16}[tensor.data_type]
    file = bundle / stored["location"]
    with file.open("r+b") as stream:
        stream.seek(offset)
        before = stream.read(length)
        values = torch.frombuffer(bytearray(before), dtype=dtype) * factor
        stream.seek(offset)
        stream.write(values.view(torch.uint8).numpy().tobytes())
    try:
        yield
    finally:
        with file.open("r+b") as stream:
            stream.seek(offset)
            stream.write(before)
