"""A graph that copies a KV cache into a longer block, on whatever device the cache lies.

ONNX Runtime's Python API copies whole values of equal shape only, and a way through the host would
move every cached token twice over the bus. The graph is one Concat with zeros. It is written here
byte by byte, in ONNX's protobuf encoding, because the runtime does not depend on `onnx`.
"""

from __future__ import annotations

import numpy as np

from edgeprune.lowering import DTYPES

INPUT, SPARE, OUTPUT = "cached", "spare", "longer"
"""[1, heads, n, head], int64 [4] (the shape of the zeros behind it), and the two joined."""

_ELEMENTS = {np.dtype(dtype.stored): dtype.onnx for dtype in DTYPES.values()}
_INT64, _IR_VERSION, _OPSET = 7, 8, 13
_INT, _TENSOR = 2, 4  # AttributeProto.AttributeType


def copy_graph(element: type) -> bytes:
    """A ModelProto for caches of one numpy type: Concat(cached, ConstantOfShape(spare)), axis 2."""
    kind = np.dtype(element)
    zero = _int(1, 1) + _int(2, _ELEMENTS[kind]) + _bytes(9, bytes(kind.itemsize))
    nodes = (
        _node("ConstantOfShape", (SPARE,), "zeros", _attribute("value", _bytes(5, zero), _TENSOR)),
        _node("Concat", (INPUT, "zeros"), OUTPUT, _attribute("axis", _int(3, 2), _INT)),
    )
    graph = b"".join(_bytes(1, node) for node in nodes) + _text(2, "copy")
    graph += _bytes(11, _value(INPUT, _ELEMENTS[kind], ("1", "heads", "n", "head")))
    graph += _bytes(11, _value(SPARE, _INT64, ("rank",)))
    graph += _bytes(12, _value(OUTPUT, _ELEMENTS[kind], ("1", "heads", "m", "head")))
    return _int(1, _IR_VERSION) + _bytes(7, graph) + _bytes(8, _int(2, _OPSET))


def _node(operator: str, inputs: tuple[str, ...], output: str, attribute: bytes) -> bytes:
    names = b"".join(_text(1, name) for name in inputs) + _text(2, output)
    return names + _text(4, operator) + _bytes(5, attribute)


def _attribute(name: str, value: bytes, kind: int) -> bytes:
    return _text(1, name) + value + _int(20, kind)


def _value(name: str, element: int, dims: tuple[str, ...]) -> bytes:
    """A ValueInfoProto; every dimension is symbolic."""
    shape = b"".join(_bytes(1, _text(2, dim)) for dim in dims)
    return _text(1, name) + _bytes(2, _bytes(1, _int(1, element) + _bytes(2, shape)))


def _text(field: int, text: str) -> bytes:
    return _bytes(field, text.encode())


def _bytes(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _int(field: int, number: int) -> bytes:
    return _varint(field << 3) + _varint(number)


def _varint(number: int) -> bytes:
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])
