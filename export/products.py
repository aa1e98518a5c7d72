"""Quantised products of a graph: how codes and scales are laid out, and the nodes that read them.

There are two forms. `DequantizeLinear` in front of each MatMul is ONNX's own and is for all
engines: codes [K, N], scales [K / block, N], or [N] where an output has one. ONNX Runtime fuses the
two, TensorRT too. `MatMulNBits` of com.microsoft is what ONNX Runtime fuses them to; a graph that
has it at once opens faster and in half the memory.

Codes of a checkpoint may have zero points: MatMulNBits takes them, the first form has a second
product in their place (offsets.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from edgeprune.errors import ExportError
from edgeprune.export.offsets import add_offsets
from edgeprune.models._quantised import Strip
from edgeprune.onnx_file import FUSED, MICROSOFT
from edgeprune.weight_format import Form

Codes = NDArray[np.uint8]
Scales = NDArray[np.float32]


@dataclass(frozen=True)
class Packed:
    """A quantised weight as a graph holds it."""

    codes: Codes  # bytes, in the order of the file
    kind: ir.DataType  # of the codes
    shape: tuple[int, ...]  # of the codes
    scales: Scales
    error: float  # sums of squares: of the difference from the checkpoint's weight
    power: float  # and of that weight
    own: bool  # whether the codes are the checkpoint's own
    shift: Codes | Scales | None = None  # zero points, or offsets of blocks; None: all are 0


class ProductForm(ABC):
    """A form of products with quantised weights."""

    @abstractmethod
    def pack(self, product: Product, form: Form, strips: Iterable[Strip]) -> Packed:
        """Lay out a weight [inputs, outputs], whose strips come one by one."""

    @abstractmethod
    def rewire(
        self,
        model: ir.Model,
        product: Product,
        form: Form,
        scales: ir.Value,
        shift: ir.Value | None,
    ) -> None:
        """Let a product read codes, which its weight's initializer holds now, scales, and
        zero points or offsets."""


@dataclass(frozen=True)
class Product:
    """The one MatMul that reads a weight, and the Cast to float32 between the two if any."""

    matmul: ir.Node
    weight: ir.Value
    cast: ir.Node | None
    inputs: int
    outputs: int
    peak: float | None = None  # of what goes into it, where samples say so


def product_of(weight: ir.Value, peak: float | None = None) -> Product:
    """The product of a weight; ExportError where it is anything but the only user."""
    users, cast = list(weight.uses()), None
    if len(users) == 1 and users[0][0].op_type == "Cast":
        cast = users[0][0]
        users = list(cast.outputs[0].uses())
    if len(users) != 1 or users[0][0].op_type != "MatMul" or users[0][1] != 1:
        kinds = ", ".join(f"{node.op_type} {node.name}" for node, _ in users) or "nothing"
        raise ExportError(
            f"the weight {weight.name} cannot be quantised: it is read by {kinds}, not by one"
            " MatMul; report the model and the command"
        )
    assert weight.shape is not None
    inputs, outputs = weight.shape.numpy()
    return Product(users[0][0], weight, cast, inputs, outputs, peak)


CODES = {
    "int4": ir.DataType.INT4,
    "int8": ir.DataType.INT8,
    "fp8": ir.DataType.FLOAT8E4M3FN,
}
"""ONNX's types of codes, by form."""


class Dequantized(ProductForm):
    """DequantizeLinear and MatMul."""

    def pack(self, product: Product, form: Form, strips: Iterable[Strip]) -> Packed:
        inputs, outputs, four = product.inputs, product.outputs, form.bits == 4
        codes = np.empty((inputs, outputs // 2 if four else outputs), np.uint8)
        scales = np.empty((inputs // (form.block or inputs), outputs), np.float32)
        offsets, moved = np.zeros_like(scales), False
        error, power, own = 0.0, 0.0, True
        for strip in strips:
            found = strip.weight.codes.view(torch.uint8).numpy()
            at = strip.outputs
            if four:  # two outputs share a byte, the first in its low half
                codes[:, at.start // 2 : at.stop // 2] = found[:, 0::2] & 15 | found[:, 1::2] << 4
            else:
                codes[:, at] = found
            scales[:, at] = strip.weight.scales.numpy()
            if strip.weight.offsets is not None:
                offsets[:, at], moved = strip.weight.offsets.numpy(), True
            error, power, own = error + strip.error, power + strip.power, own and strip.own
        kind = CODES[str(form)]
        held = scales if form.block else scales[0]
        shift = offsets if moved else None
        return Packed(codes, kind, (inputs, outputs), held, error, power, own, shift)

    def rewire(
        self,
        model: ir.Model,
        product: Product,
        form: Form,
        scales: ir.Value,
        shift: ir.Value | None,
    ) -> None:
        attributes = {"axis": 0, "block_size": form.block} if form.block else {"axis": 1}
        matmul, read = product.matmul, product.cast or product.matmul
        name = "/".join([*(matmul.name or "").split("/")[:-1], "dequantizelinear"])
        node = ir.node("DequantizeLinear", [product.weight, scales], attributes, name=name)
        node.outputs[0].name = f"{product.weight.name}/float"
        node.outputs[0].shape, node.outputs[0].type = product.weight.shape, scales.type
        model.graph.insert_before(read, node)
        matmul.replace_input_with(1, node.outputs[0])
        if product.cast is not None:
            model.graph.remove(product.cast, safe=True)
        if shift is not None:
            add_offsets(model, matmul, shift)


class Fused(ProductForm):
    """MatMulNBits: codes + 8 or 128, uint8 [N, blocks, bytes of a block], scales [N, blocks], zero
    points likewise raised and packed, uint8 [N, bytes of the blocks]."""

    def pack(self, product: Product, form: Form, strips: Iterable[Strip]) -> Packed:
        inputs, outputs = product.inputs, product.outputs
        block, half = form.fused_block(inputs), 2 ** (form.bits - 1)
        blocks, padding = -(-inputs // block), -inputs % block
        codes = np.empty((outputs, blocks, block * form.bits // 8), np.uint8)
        scales = np.empty((outputs, blocks), np.float32)
        zeros, moved = np.full((outputs, blocks + blocks % 2), half, np.uint8), False
        error, power, own = 0.0, 0.0, True
        for strip in strips:
            raised = strip.weight.codes.numpy().T.astype(np.int16) + half
            found = np.pad(raised.astype(np.uint8), ((0, 0), (0, padding)), constant_values=half)
            found = found.reshape(-1, blocks, block)
            if form.bits == 4:  # two inputs share a byte, the first in its low half
                found = found[..., 0::2] | found[..., 1::2] << 4
            codes[strip.outputs] = found
            scales[strip.outputs] = strip.weight.scales.numpy().T  # of one scale, in each block
            if strip.weight.zeros is not None:
                zeros[strip.outputs, :blocks] += strip.weight.zeros.numpy().T.view(np.uint8)
                moved = True
            error, power, own = error + strip.error, power + strip.power, own and strip.own
        held = zeros[:, 0::2] | zeros[:, 1::2] << 4 if form.bits == 4 else zeros[:, :blocks]
        shift = np.ascontiguousarray(held, np.uint8) if moved else None
        return Packed(codes, ir.DataType.UINT8, codes.shape, scales, error, power, own, shift)

    def rewire(
        self,
        model: ir.Model,
        product: Product,
        form: Form,
        scales: ir.Value,
        shift: ir.Value | None,
    ) -> None:
        matmul, weight = product.matmul, product.weight
        sizes = {"K": product.inputs, "N": product.outputs, "bits": form.bits}
        sizes["block_size"] = form.fused_block(product.inputs)
        fused = ir.node(
            FUSED,
            [matmul.inputs[0], weight, scales, *([] if shift is None else [shift])],
            {**sizes, "accuracy_level": LEVEL},
            domain=MICROSOFT,
            name=f"{matmul.name}nbits",
        )
        put_in_place(model, matmul, [fused])
        model.graph.opset_imports[MICROSOFT] = 1
        if product.cast is not None:
            model.graph.remove(product.cast, safe=True)


def put_in_place(model: ir.Model, old: ir.Node, made: Sequence[ir.Node]) -> None:
    """Let the last of some nodes give what a node gave, and remove that."""
    before, after = old.outputs[0], made[-1].outputs[0]
    after.shape, after.type, name = before.shape, before.type, before.name
    model.graph.insert_before(old, made)
    ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
    model.graph.remove(old, safe=True)
    after.name = name


LEVEL = 4
"""Accuracy level of MatMulNBits: activations are rounded to int8, block by block, which is what
ONNX Runtime does with DequantizeLinear and MatMul too unless it is told otherwise."""

FORMS: dict[str, ProductForm] = {"DequantizeLinear": Dequantized(), FUSED: Fused()}
"""By the operator that reads the codes."""
