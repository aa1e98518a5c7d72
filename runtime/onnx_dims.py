"""Numbers in place of named sizes in an ONNX file, so that TensorRT sees caches of fixed length.

Only the sizes of the graph's inputs and outputs are rewritten, which takes so little that the
device where engines are built needs no onnx package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from edgeprune import protobuf

_GRAPH = 7  # ModelProto.graph
_ENDS = (11, 12)  # GraphProto.input, GraphProto.output: ValueInfoProto
_TO_SIZE = (2, 1, 2, 1)  # ValueInfoProto.type, .tensor_type, .shape, .dim
_SIZE, _SIZE_NAME = 1, 2  # Dimension.dim_value, Dimension.dim_param

Edit = Callable[[memoryview], bytes]


def with_sizes(model: bytes, sizes: Mapping[str, int]) -> bytes:
    """The model with each named size of an input or output that is in `sizes` made a number.

    ValueError where the bytes are no ONNX model, or where a name occurs nowhere.
    """
    used: set[str] = set()
    edit: Edit = partial(_size, sizes=sizes, used=used)
    for number in reversed(_TO_SIZE):
        edit = partial(_edited, edits={number: edit})
    graph = partial(_edited, edits=dict.fromkeys(_ENDS, edit))
    result = _edited(memoryview(model), edits={_GRAPH: graph})
    if lost := sizes.keys() - used:
        raise ValueError(f"no input or output has the size {', '.join(sorted(lost))}")
    return result


def _size(message: memoryview, sizes: Mapping[str, int], used: set[str]) -> bytes:
    """One Dimension: a name that is in `sizes` becomes its number, all else stays."""
    for number, _, _, begin, end in protobuf.fields(message):
        name = bytes(message[begin:end]).decode() if number == _SIZE_NAME else ""
        if name in sizes:
            used.add(name)
            return protobuf.integer(_SIZE, sizes[name])
    return bytes(message)


def _edited(message: memoryview, edits: Mapping[int, Edit]) -> bytes:
    """The message with the fields of some numbers replaced by what their edits make of them."""
    parts: list[bytes | memoryview] = []
    for number, kind, start, begin, end in protobuf.fields(message):
        if number in edits and kind == protobuf.BYTES:
            parts.append(protobuf.block(number, edits[number](message[begin:end])))
        else:
            parts.append(message[start:end])
    return b"".join(parts)
