"""The wire format of protobuf: a run of fields, each a key (number << 3 | wire type) and a value.

Enough of it to read and write ONNX files where no onnx package is, without copying what is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Wire types; the two others, groups, are written by nobody any more."""


def fields(message: memoryview) -> Iterator[tuple[int, int, int, int, int]]:
    """Each field's number and wire type, and where it starts, its value begins and both end.

    ValueError where the bytes are no message.
    """
    start, size = 0, len(message)
    while start < size:
        key, begin = varint(message, start)
        kind = key & 7
        if kind == VARINT:
            end = varint(message, begin)[1]
        elif kind == BYTES:
            length, begin = varint(message, begin)
            end = begin + length
        elif kind in (FIXED64, FIXED32):
            end = begin + (8 if kind == FIXED64 else 4)
        else:
            raise ValueError(f"byte {start} starts no protobuf field")
        if end > size:
            raise ValueError(f"the field at byte {start} is cut off")
        yield key >> 3, kind, start, begin, end
        start = end


def varint(message: memoryview, start: int) -> tuple[int, int]:
    """A number in groups of seven bits, lowest first, and where it ends."""
    value = 0
    for index, byte in enumerate(message[start : start + 10]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, start + index + 1
    raise ValueError(f"the number at byte {start} has no end")


def signed(value: int) -> int:
    """A varint as an int64."""
    return value - (1 << 64) if value >> 63 else value


def integer(number: int, value: int) -> bytes:
    """The field of this number with a value of at least 0."""
    return _varint(number << 3 | VARINT) + _varint(value)


def block(number: int, data: bytes) -> bytes:
    """The field of this number with bytes: a text, a message, numbers without keys."""
    return _varint(number << 3 | BYTES) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    groups = []
    while True:
        value, group = value >> 7, value & 0x7F
        groups.append(group | (0x80 if value else 0))
        if not value:
            return bytes(groups)
