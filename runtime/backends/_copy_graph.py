"""A graph that copies a KV cache into a longer block, on whatever device the cache lies.

ONNX Runtime's Python API copies whole values of equal shape only, and a way through the host would
move every cached token twice over the bus. The graph is one Concat with zeros. It is written here
byte by byte, in ONNX's protobuf encoding, because the runtime does not depend on `onnx`.
"""

from __future__ import annotations

import numpy as np

from edgeprune.lowering import DTYPES
from edgeprune.protobuf import block, integer

INPUT, SPARE, OUTPUT = "cached", "spare", "longer"
"""[1, heads, n, head], int64 [4] (the shape of the zeros behind it), and the two joined."""

_ELEMENTS = {np.dtype(dtype.stored): dtype.onnx for dtype in DTYPES.values()}
_INT64, _IR_VERSION, _OPSET = 7, 8, 13
_INT, _TENSOR = 2, 4  # AttributeProto.AttributeType


def copy_graph(element: type) -> bytes:
    """A ModelProto for caches of one numpy type: Concat(cached, ConstantOfShape(spare)), axis 2."""
    kind = np.dtype(element)
    zero = integer(1, 1) + integer(2, _ELEMENTS[kind]) + block(9, bytes(kind.itemsize))
    nodes = (
        _node("ConstantOfShape", (SPARE,), "zeros", _attribute("value", block(5, zero), _TENSOR)),
        _node("Concat", (INPUT, "zeros"), OUTPUT, _attribute("axis", integer(3, 2), _INT)),
    )
    graph = b"".join(block(1, node) for node in nodes) + _text(2, "copy")
    graph += block(11, _value(INPUT, _ELEMENTS[kind], ("1", "heads", "n", "head")))
    graph += block(11, _value(SPARE, _INT64, ("rank",)))
    graph += block(12, _value(OUTPUT, _ELEMENTS[kind], ("1", "heads", "m", "head")))
    return integer(1, _IR_VERSION) + block(7, graph) + block(8, integer(2, _OPSET))


def _node(operator: str, inputs: tuple[str, ...], output: str, attribute: bytes) -> bytes:
    names = b"".join(_text(1, name) for name in inputs) + _text(2, output)
    return names + _text(4, operator) + block(5, attribute)


def _attribute(name: str, value: bytes, kind: int) -> bytes:
    return _text(1, name) + value + integer(20, kind)


def _value(name: str, element: int, dims: tuple[str, ...]) -> bytes:
    """A ValueInfoProto; every dimension is symbolic."""
    shape = b"".join(block(1, _text(2, dim)) for dim in dims)
    return _text(1, name) + block(2, block(1, integer(1, element) + block(2, shape)))


def _text(field: int, text: str) -> bytes:
    return block(field, text.encode())
