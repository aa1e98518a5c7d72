"""A quantised embedding: int8 codes [rows, width], one scale a row, and the nodes that read rows.

Rows are gathered first, so that only those that a call names are computed. TensorRT takes a
constant of int8 in DequantizeLinear alone, which would compute the whole table; there four codes
are an int32, as digits of a number to the base of 215, which integer operators take apart.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from edgeprune.errors import ExportError
from edgeprune.export.products import Packed
from edgeprune.models._quantised import Strip
from edgeprune.weight_format import LARGEST_ROW


class TableForm(ABC):
    """A form of quantised tables."""

    def pack(self, shape: Sequence[int], strips: Iterable[Strip]) -> Packed:
        """Lay out a table [rows, width], whose rows are the outputs of strips."""
        rows, width = shape
        codes, scales = np.empty((rows, width), np.uint8), np.empty((rows, 1), np.float32)
        error, power, own = 0.0, 0.0, True
        for strip in strips:
            codes[strip.outputs] = strip.weight.codes.numpy().view(np.uint8).T
            scales[strip.outputs] = strip.weight.scales.numpy().T
            error, power, own = error + strip.error, power + strip.power, own and strip.own
        return Packed(codes, ir.DataType.INT8, (rows, width), scales, error, power, own)

    @abstractmethod
    def rewire(
        self, model: ir.Model, table: ir.Value, gathers: Sequence[ir.Node], scales: ir.Value
    ) -> None:
        """Let Gathers read codes, which the table's initializer holds now, and scales."""


class Bytes(TableForm):
    """Gather codes and scales, then Cast and Mul."""

    def rewire(
        self, model: ir.Model, table: ir.Value, gathers: Sequence[ir.Node], scales: ir.Value
    ) -> None:
        for gather in gathers:
            _scaled(model, gather, gather.outputs[0], [], scales)
            gather.outputs[0].type = ir.TensorType(ir.DataType.INT8)


class Words(TableForm):
    """Gather words of four codes, take them apart, then Cast and Mul. Code k of word j is that of
    channel k * width / 4 + j, so that the parts are joined as they are."""

    def pack(self, shape: Sequence[int], strips: Iterable[Strip]) -> Packed:
        rows, width = shape
        if width % DIGITS:
            raise ExportError(
                f"embedding=on of --weights wants a width that {DIGITS} divides; this model's is"
                f" {width}, export with embedding=off"
            )
        packed = super().pack(shape, strips)
        words = np.zeros((rows, width // DIGITS), np.int32)
        for digit in reversed(np.split(packed.codes.view(np.int8), DIGITS, axis=1)):
            words *= BASE
            words += digit
            words += LARGEST_ROW
        held, kind = words.view(np.uint8), ir.DataType.INT32
        return replace(packed, codes=held, kind=kind, shape=words.shape)

    def rewire(
        self, model: ir.Model, table: ir.Value, gathers: Sequence[ir.Node], scales: ir.Value
    ) -> None:
        base, middle = (
            _constant(model, f"{table.name}/{name}", value)
            for name, value in (("base", BASE), ("middle", LARGEST_ROW))
        )
        for gather in gathers:
            name, rest = gather.name, gather.outputs[0]
            nodes, digits = list[ir.Node](), list[ir.Value]()
            for number in range(DIGITS - 1):
                left = ir.node("Div", [rest, base], name=f"{name}/div_{number}")
                whole = ir.node("Mul", [*left.outputs, base], name=f"{name}/mul_{number}")
                digit = ir.node("Sub", [rest, *whole.outputs], name=f"{name}/sub_{number}")
                nodes += [left, whole, digit]
                digits.append(digit.outputs[0])
                rest = left.outputs[0]
            joined = ir.node("Concat", [*digits, rest], {"axis": -1}, name=f"{name}/concat")
            codes = ir.node("Sub", [*joined.outputs, middle], name=f"{name}/sub")
            _scaled(model, gather, codes.outputs[0], [*nodes, joined, codes], scales)
            word = gather.outputs[0]
            word.type = ir.TensorType(ir.DataType.INT32)
            if word.shape is not None:
                word.shape = ir.Shape([*word.shape[:-1], table.shape[-1]])  # type: ignore[index]


BASE = 2 * LARGEST_ROW + 1
DIGITS = 4
"""Codes in a word: BASE**4 is less than 2**31."""


def _constant(model: ir.Model, name: str, value: int) -> ir.Value:
    """A number int32 []."""
    found = ir.Value(name=name, const_value=ir.tensor(np.array(value, np.int32), name=name))
    found.shape, found.dtype = ir.Shape([]), ir.DataType.INT32
    model.graph.register_initializer(found)
    return found


def _scaled(
    model: ir.Model,
    gather: ir.Node,
    codes: ir.Value,
    between: Sequence[ir.Node],  # nodes that make codes of what was gathered
    scales: ir.Value,
) -> None:
    """Let what reads a Gather's rows read its codes, times the scales of the rows."""
    rows, name = gather.outputs[0], gather.name
    cast = ir.node("Cast", [codes], {"to": scales.dtype}, name=f"{name}/cast")
    own = ir.node("Gather", [scales, gather.inputs[1]], {"axis": 0}, name=f"{name}/scale")
    wide = ir.node("Mul", [*cast.outputs, *own.outputs], name=f"{name}/mul")
    made, inner = wide.outputs[0], {*between, cast}
    made.shape, made.type = rows.shape, rows.type
    for user, index in [use for use in rows.uses() if use[0] not in inner]:
        user.replace_input_with(index, made)
    model.graph.insert_after(gather, [*between, cast, own, wide])


TABLES: dict[str, TableForm] = {"Gather": Bytes(), "Div": Words()}
"""By the operator that makes floats of codes, or takes them apart."""


def gathers_of(table: ir.Value) -> list[ir.Node]:
    """The Gathers that read a table; ExportError where anything else does."""
    users = list(table.uses())
    if strange := [node for node, index in users if (node.op_type, index) != ("Gather", 0)]:
        raise ExportError(
            f"the table {table.name} cannot be quantised: it is read by {strange[0].op_type}"
            f" {strange[0].name}; report the model and the command"
        )
    return [node for node, _ in users]
