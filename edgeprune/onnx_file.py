"""What an ONNX file of a bundle is made of, read without an onnx package and without its weights.

The reader knows the fields that exports write and refuses all others by name: bodies of control
flow, functions, training, sparse tensors, operators of other domains but one. So nothing that an
engine would run stays unseen. It goes four messages deep, never calls itself, and reads a bounded
number of fields. A field that may stand once and stands twice is refused too: parsers disagree on
those.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edgeprune.lowering import DTYPES
from edgeprune.protobuf import BYTES, FIXED32, FIXED64, VARINT, fields, signed, varint

FIELDS = 3_000_000
"""Fields read at most. A 7B decoder with plain operators has some 200,000."""
NUMBERS = {d.onnx: d.name for d in DTYPES.values()} | {6: "int32", 7: "int64", 9: "bool"}
"""TensorProto.DataType, as far as inputs and outputs have them."""
CODES = {2: "uint8", 3: "int8", 17: "fp8", 22: "int4"}
"""The same, of quantised weights."""
MICROSOFT = "com.microsoft"
FUSED, INTEGERS = "MatMulNBits", "MatMulIntegerToFloat"
GROUP_QUERY, SKIP_NORM = "GroupQueryAttention", "SkipSimplifiedLayerNormalization"
OWN = (FUSED, INTEGERS, GROUP_QUERY, SKIP_NORM)
"""The operators of ONNX Runtime's own domain that a bundle may have."""
AXES = 8
QUANTISED = ("DequantizeLinear", "QuantizeLinear", FUSED, INTEGERS)
"""Operators that read or make codes."""

Found = dict[int, list[memoryview | int]]  # values of a message by the field's number
WireTypes = Mapping[int, tuple[int, ...]]  # wire types by the field's number


@dataclass(frozen=True, slots=True)
class _Message:
    """A kind of message: its fields, those that may stand many times, and names of refused ones."""

    title: str
    once: WireTypes
    many: WireTypes = field(default_factory=dict)
    refused: Mapping[int, str] = field(default_factory=dict)


_B, _V, _LIST = (BYTES,), (VARINT,), (BYTES, VARINT)  # a list of numbers is packed or not
_MODEL = _Message(
    "model",
    {1: _V, 2: _B, 3: _B, 4: _B, 5: _V, 6: _B, 7: _B},
    {8: _B, 14: _B},
    {20: "training", 25: "functions", 26: "devices"},
)
_OPSET = _Message("opset", {1: _B, 2: _V})
_GRAPH = _Message(
    "graph",
    {2: _B, 10: _B},
    {1: _B, 5: _B, 11: _B, 12: _B, 13: _B, 16: _B},
    {14: "quantization annotations", 15: "sparse tensors"},
)
_NODE = _Message(
    "node",
    {3: _B, 4: _B, 6: _B, 7: _B},
    {1: _B, 2: _B, 5: _B, 9: _B},
    {8: "functions", 10: "devices"},
)
_ATTRIBUTE = _Message(
    "attribute",
    {1: _B, 2: (FIXED32,), 3: _V, 4: _B, 5: _B, 13: _B, 20: _V},
    {7: (BYTES, FIXED32), 8: _LIST, 9: _B},
    {
        6: "bodies of control flow",
        11: "bodies of control flow",
        21: "functions",
        22: "sparse tensors",
        23: "sparse tensors",
    },
)
_TENSOR = _Message(
    "tensor",
    {2: _V, 8: _B, 9: _B, 12: _B, 14: _V},
    {
        1: _LIST,
        4: (BYTES, FIXED32),
        5: _LIST,
        7: _LIST,
        10: (BYTES, FIXED64),
        11: _LIST,
        13: _B,
        16: _B,
    },
    {3: "segments", 6: "texts"},
)
_ENTRY = _Message("entry", {1: _B, 2: _B})
_VALUE = _Message("input or output", {1: _B, 2: _B, 3: _B}, {4: _B})
_TYPE = _Message("type", {1: _B, 6: _B}, refused={4: "sequences", 5: "maps", 9: "optional values"})
_TENSOR_TYPE = _Message("tensor type", {1: _V, 2: _B})
_SHAPE = _Message("shape", {}, {1: _B})
_SIZE = _Message("size", {1: _V, 2: _B, 3: _B})


@dataclass(frozen=True, slots=True)
class Value:
    """An input or output of a graph; a size that is open has a name."""

    name: str
    dtype: str
    sizes: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join(map(str, self.sizes))}]"


@dataclass(frozen=True, slots=True)
class Quantised:
    """A node that reads quantised weights; inputs that are no constants are None."""

    name: str
    operator: str
    inputs: tuple[Value | None, ...]
    attributes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class OnnxFile:
    """One graph: its opset, its operators, its ends, and the files in which its weights lie."""

    opset: int
    operators: frozenset[str]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    files: frozenset[str]
    quantised: tuple[Quantised, ...] = ()


def read(file: Path) -> OnnxFile:
    """Read a file; ValueError where it is no ONNX model, or has what no export writes."""
    with file.open("rb") as stream:
        if not file.stat().st_size:
            raise ValueError("it is empty")
        return _Reader().model(memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)))


class _Reader:
    """Counts the fields that were read."""

    def __init__(self) -> None:
        self._left = FIELDS

    def model(self, message: memoryview) -> OnnxFile:
        found = self._found(message, _MODEL)
        (graph,) = _views(found, 7) or [memoryview(b"")]
        parts = self._found(graph, _GRAPH)
        tensors, operators = _views(parts, 5), set[str]()
        constants = {value.name: value for value in map(self._constant, tensors)}
        if len(constants) != len(tensors):
            raise ValueError("it has two tensors of one name")
        quantised = list[Quantised]()
        for view in _views(parts, 1):
            node = self._found(view, _NODE)
            operator = _text(node, 4)
            if (domain := _text(node, 7)) and (domain != MICROSOFT or operator not in OWN):
                raise ValueError(f"it has the operator {domain}.{operator}")
            if not any(map(len, _views(node, 2))):
                raise ValueError(f"it has a node of the operator {operator} without outputs")
            operators.add(operator)
            tensors += self._tensors(node)
            if operator in QUANTISED:
                quantised.append(self._quantised(node, operator, constants))
        return OnnxFile(
            self._opset(_views(found, 8), own=not operators.isdisjoint(OWN)),
            frozenset(operators),
            tuple(map(self._value, _views(parts, 11))),
            tuple(map(self._value, _views(parts, 12))),
            frozenset(name for view in tensors for name in self._files(view)),
            tuple(quantised),
        )

    def _opset(self, messages: list[memoryview], *, own: bool) -> int:
        """Of ONNX's own operators; ONNX Runtime's one, where it is there, is of version 1."""
        opsets = [self._found(view, _OPSET) for view in messages]
        usual = [opset for opset in opsets if not _text(opset, 1)]
        others = [(_text(opset, 1), _number(opset, 2)) for opset in opsets if _text(opset, 1)]
        if len(usual) != 1 or others != own * [(MICROSOFT, 1)]:
            raise ValueError("it has operators of several domains")
        return _number(usual[0], 2)

    def _constant(self, message: memoryview) -> Value:
        """Type and sizes of a tensor of the graph."""
        found = self._found(message, _TENSOR)
        number = _number(found, 2)
        kinds = NUMBERS | CODES
        return Value(_text(found, 8), kinds.get(number, f"type {number}"), tuple(_sizes(found)))

    def _quantised(self, node: Found, operator: str, constants: Mapping[str, Value]) -> Quantised:
        names = [bytes(view).decode() for view in _views(node, 1)]
        attributes = [self._found(view, _ATTRIBUTE) for view in _views(node, 5)]
        return Quantised(
            _text(node, 3),
            operator,
            tuple(map(constants.get, names)),
            {_text(found, 1): signed(_number(found, 3)) for found in attributes},
        )

    def _tensors(self, node: Found) -> list[memoryview]:
        """The constants among a node's attributes."""
        attributes = (self._found(view, _ATTRIBUTE) for view in _views(node, 5))
        return [tensor for attribute in attributes for tensor in _views(attribute, 5)]

    def _files(self, tensor: memoryview) -> Iterator[str]:
        """The files in which a tensor's bytes lie; none where they are in the graph."""
        found = self._found(tensor, _TENSOR)
        entries = [self._found(view, _ENTRY) for view in _views(found, 13)]
        named = [_text(entry, 2) for entry in entries if _text(entry, 1) == "location"]
        if len(named) > 1 or bool(named) != bool(entries or _number(found, 14)):
            raise ValueError(f"it has the tensor {_text(found, 8)!r}, which lies in no one file")
        yield from named

    def _value(self, message: memoryview) -> Value:
        value = self._found(message, _VALUE)
        kind = self._inner(self._inner(value, 2, _TYPE), 1, _TENSOR_TYPE)
        shape = self._inner(kind, 2, _SHAPE)
        number = _number(kind, 1)
        sizes = tuple(self._size(view) for view in _views(shape, 1))
        return Value(_text(value, 1), NUMBERS.get(number, f"type {number}"), sizes)

    def _size(self, message: memoryview) -> int | str:
        found = self._found(message, _SIZE)
        return signed(_number(found, 1)) if 1 in found else _text(found, 2)

    def _inner(self, found: Found, number: int, kind: _Message) -> Found:
        views = _views(found, number)
        return self._found(views[0], kind) if views else {}

    def _found(self, message: memoryview, kind: _Message) -> Found:
        """The values of a message; ValueError at a field that no export writes."""
        found: Found = {}
        for number, wire, _, begin, end in fields(message):
            self._left -= 1
            if self._left < 0:
                raise ValueError(f"it has more than {FIELDS:,} fields")
            if number in kind.refused:
                raise ValueError(f"it has {kind.refused[number]}")
            if wire not in (kind.once.get(number) or kind.many.get(number, ())):
                raise ValueError(f"a {kind.title} has a field {number} of wire type {wire}")
            values = found.setdefault(number, [])
            if values and number in kind.once:
                raise ValueError(f"a {kind.title} has its field {number} twice")
            values.append(varint(message, begin)[0] if wire == VARINT else message[begin:end])
        return found


def _sizes(tensor: Found) -> Iterator[int]:
    """A tensor's sizes, the first AXES at least; a list of numbers is packed or not."""
    for value in tensor.get(1, []):
        if isinstance(value, int):
            yield signed(value)
            continue
        at = 0
        while at < min(len(value), AXES):
            size, at = varint(value, at)
            yield signed(size)


def _views(found: Found, number: int) -> list[memoryview]:
    return [value for value in found.get(number, []) if isinstance(value, memoryview)]


def _text(found: Found, number: int) -> str:
    """A text, empty where there is none; ValueError where it is not UTF-8."""
    views = _views(found, number)
    return bytes(views[0]).decode() if views else ""


def _number(found: Found, number: int) -> int:
    values = found.get(number, [])
    return values[0] if values and isinstance(values[0], int) else 0
