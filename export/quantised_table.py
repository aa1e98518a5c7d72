"""A quantised embedding: int8 codes [rows, width], one scale a row, and the nodes that read rows.

Where rows are gathered first only those that a call names are computed. TensorRT takes a constant
of int8 in DequantizeLinear alone, so there that comes first; the engine keeps the codes, and
whether it computes the whole table at every call is up to it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from edgeprune.errors import ExportError
from edgeprune.export.products import Packed
from edgeprune.models._quantised import Strip


class TableForm(ABC):
    """A form of quantised tables."""

    scale_axes: int  # of the scales: [rows] or [rows, 1]

    def pack(self, shape: Sequence[int], strips: Iterable[Strip]) -> Packed:
        """Lay out a table [rows, width], whose rows are the outputs of strips."""
        rows, width = shape
        codes, scales = np.empty((rows, width), np.uint8), np.empty((rows, 1), np.float32)
        error, power, own = 0.0, 0.0, True
        for strip in strips:
            codes[strip.outputs] = strip.weight.codes.numpy().view(np.uint8).T
            scales[strip.outputs] = strip.weight.scales.numpy().T
            error, power, own = error + strip.error, power + strip.power, own and strip.own
        held = scales if self.scale_axes == 2 else scales[:, 0]
        return Packed(codes, ir.DataType.INT8, (rows, width), held, error, power, own)

    @abstractmethod
    def rewire(
        self, model: ir.Model, table: ir.Value, gathers: Sequence[ir.Node], scales: ir.Value
    ) -> None:
        """Let Gathers read codes, which the table's initializer holds now, and scales."""


def gathers_of(table: ir.Value) -> list[ir.Node]:
    """The Gathers that read a table; ExportError where anything else does."""
    users = list(table.uses())
    if strange := [node for node, index in users if (node.op_type, index) != ("Gather", 0)]:
        raise ExportError(
            f"the table {table.name} cannot be quantised: it is read by {strange[0].op_type}"
            f" {strange[0].name}; report the model and the command"
        )
    return [node for node, _ in users]


class RowsFirst(TableForm):
    """Gather codes and scales, then Cast and Mul."""

    scale_axes = 2

    def rewire(
        self, model: ir.Model, table: ir.Value, gathers: Sequence[ir.Node], scales: ir.Value
    ) -> None:
        for gather in gathers:
            rows, name = gather.outputs[0], gather.name
            kind, shape = scales.dtype, rows.shape
            cast = ir.node("Cast", [rows], {"to": kind}, name=f"{name}/cast")
            own = ir.node("Gather", [scales, gather.inputs[1]], {"axis": 0}, name=f"{name}/scale")
            wide = ir.node("Mul", [*cast.outputs, *own.outputs], name=f"{name}/mul")
            made = wide.outputs[0]
            made.shape, made.type = shape, rows.type
            for user, index in [use for use in rows.uses() if use[0] is not cast]:
                user.replace_input_with(index, made)
            rows.type = ir.TensorType(ir.DataType.INT8)
            model.graph.insert_after(gather, [cast, own, wide])


class TableFirst(TableForm):
    """DequantizeLinear, then Gather."""

    scale_axes = 1

    def rewire(
        self, model: ir.Model, table: ir.Value, gathers: Sequence[ir.Node], scales: ir.Value
    ) -> None:
        name = f"{table.name}/dequantizelinear"
        node = ir.node("DequantizeLinear", [table, scales], {"axis": 0}, name=name)
        floats = node.outputs[0]
        floats.name, floats.shape, floats.type = f"{table.name}/float", table.shape, scales.type
        first = next(node for node in model.graph if node in gathers)
        model.graph.insert_before(first, node)
        for gather in gathers:
            gather.replace_input_with(0, floats)


TABLES: dict[str, TableForm] = {"Gather": RowsFirst(), "DequantizeLinear": TableFirst()}
"""By the operator that reads the codes."""
