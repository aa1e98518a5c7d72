"""Numbers in place of named sizes in an ONNX file, so that TensorRT sees caches of fixed length.

An ONNX file is a protobuf message: a run of fields, each a key (number << 3 | wire type) and a
value. Only the sizes of the graph's inputs and outputs are rewritten, which takes so little that
the device where engines are built needs no onnx package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

_GRAPH = 7  # ModelProto.graph
_ENDS = (11, 12)  # GraphProto.input, GraphProto.output: ValueInfoProto
_TO_SIZE = (2, 1, 2, 1)  # ValueInfoProto.type, .tensor_type, .shape, .dim
_SIZE, _SIZE_NAME = 1, 2  # Dimension.dim_value, Dimension.dim_param

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

Edit = Callable[[bytes], bytes]


def with_sizes(model: bytes, sizes: Mapping[str, int]) -> bytes:
    """The model with each named size of an input or output that is in `sizes` made a number.

    ValueError where the bytes are no ONNX model, or where a name occurs nowhere.
    """
    used: set[str] = set()
    edit: Edit = partial(_size, sizes=sizes, used=used)
    for number in reversed(_TO_SIZE):
        edit = partial(_edited, edits={number: edit})
    graph = partial(_edited, edits=dict.fromkeys(_ENDS, edit))
    result = _edited(model, edits={_GRAPH: graph})
    if lost := sizes.keys() - used:
        raise ValueError(f"no input or output has the size {', '.join(sorted(lost))}")
    return result


def _size(message: bytes, sizes: Mapping[str, int], used: set[str]) -> bytes:
    """One Dimension: a name that is in `sizes` becomes its number, all else stays."""
    for number, _, value in _fields(message):
        name = value.decode() if number == _SIZE_NAME else ""
        if name in sizes:
            used.add(name)
            return _varint(_SIZE << 3 | _VARINT) + _varint(sizes[name])
    return message


def _edited(message: bytes, edits: Mapping[int, Edit]) -> bytes:
    """The message with the fields of some numbers replaced by what their edits make of them."""
    parts = []
    for number, whole, value in _fields(message):
        if number in edits:
            changed = edits[number](value)
            whole = _varint(number << 3 | _BYTES) + _varint(len(changed)) + changed
        parts.append(whole)
    return b"".join(parts)


def _fields(message: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Each field's number, its bytes as they stand, and its value without key and length."""
    start = 0
    while start < len(message):
        key, begin = _read_varint(message, start)
        kind = key & 7
        if kind == _VARINT:
            end = _read_varint(message, begin)[1]
        elif kind == _BYTES:
            length, begin = _read_varint(message, begin)
            end = begin + length
        elif kind in (_FIXED64, _FIXED32):
            end = begin + (8 if kind == _FIXED64 else 4)
        else:
            raise ValueError(f"byte {start} starts no protobuf field")
        if end > len(message):
            raise ValueError(f"the field at byte {start} is cut off")
        yield key >> 3, message[start:end], message[begin:end]
        start = end


def _read_varint(message: bytes, start: int) -> tuple[int, int]:
    """A number in groups of seven bits, lowest first, and where it ends."""
    value = 0
    for place, byte in enumerate(message[start : start + 10]):
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, start + place + 1
    raise ValueError(f"the number at byte {start} has no end")


def _varint(value: int) -> bytes:
    groups = []
    while True:
        value, group = value >> 7, value & 0x7F
        groups.append(group | (0x80 if value else 0))
        if not value:
            return bytes(groups)
