"""Products whose inputs are rounded to 8 bits too, so that codes are multiplied.

`MatMulIntegerToFloat` of com.microsoft is for ONNX Runtime on a CPU. Each token has a scale of its
own, found as the graph runs:

    scale = max(|x|) / 127
    codes = QuantizeLinear(x / scale, 1, 128)          uint8, 128 stands for 0
    y = MatMulIntegerToFloat(codes, weights) * scale   times one scale an output

One scale for a whole call, as DynamicQuantizeLinear has it, would be set by the largest token: real
models have a few that are far larger than all others, and these would leave the others few values.

TensorRT wants a scale that is known before: QuantizeLinear and DequantizeLinear in front of both
inputs of a MatMul, which it fuses. Samples say what the scale is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeprune.errors import ExportError
from edgeprune.export.offsets import insert_behind
from edgeprune.export.products import (
    CODES,
    Dequantized,
    Product,
    ProductForm,
    put_in_place,
)
from edgeprune.lowering import DTYPES
from edgeprune.models._rounded_inputs import LARGEST, TINY, scale_of
from edgeprune.onnx_file import MICROSOFT
from edgeprune.weight_format import Form


class ByToken(Dequantized):
    """MatMulIntegerToFloat: codes int8 [K, N], one scale an output; fp32 alone."""

    def rewire(
        self,
        model: ir.Model,
        product: Product,
        form: Form,
        scales: ir.Value,
        shift: ir.Value | None,
    ) -> None:
        assert shift is None and product.cast is None, "codes are symmetric, the graph is fp32"
        matmul = product.matmul
        (x, _), name = matmul.inputs, matmul.name
        assert x is not None
        stem = "/".join((name or "").split("/")[:-1])
        codes, scale = _rounded(model, x, stem)
        one, middle = _constant(model, np.float32(1)), _constant(model, MIDDLE)
        made = ir.node(
            "MatMulIntegerToFloat",
            [codes, product.weight, one, scales, middle],
            domain=MICROSOFT,
            name=f"{name}integer",
        )
        scaled = ir.node("Mul", [made.outputs[0], scale], name=f"{stem}/scaled")
        put_in_place(model, matmul, [made, scaled])
        made.outputs[0].shape, made.outputs[0].type = scaled.outputs[0].shape, scales.type
        model.graph.opset_imports[MICROSOFT] = 1


class ByTensor(Dequantized):
    """Q and DQ of inputs, one scale a tensor; DQ of weights, one scale an output."""

    def rewire(
        self,
        model: ir.Model,
        product: Product,
        form: Form,
        scales: ir.Value,
        shift: ir.Value | None,
    ) -> None:
        super().rewire(model, product, form, scales, shift)
        x, weight = product.matmul.inputs[0], product.weight.name
        assert x is not None and x.dtype is not None and scales.dtype is not None
        if product.peak is None:
            raise ExportError(
                f"no calibration sample says how large the inputs of {weight} are; export with"
                " samples, or with activations=off"
            )
        number = scale_of(product.peak, DTYPES_OF[scales.dtype], is_float8=form.float8)
        rounding = (user for user in x.consumers() if user.op_type == "QuantizeLinear")
        found = next((one for one in rounding if _scale_of(one) == float(number)), None)
        if found is None:
            found = self._round(model, x, product, form, number)
        (floats,) = found.outputs[0].consumers()
        product.matmul.replace_input_with(0, floats.outputs[0])

    def _round(
        self, model: ir.Model, x: ir.Value, product: Product, form: Form, number: Tensor
    ) -> ir.Node:
        """Q and DQ behind a tensor, with a scale; the Q."""
        stem = "/".join((product.matmul.name or "").split("/")[:-1])
        assert x.dtype is not None
        scale = _initializer(model, f"{stem}/inputs/scale", _typed(number.numpy(), x.dtype))
        zero = _constant(model, np.zeros((), CODES[str(form)].numpy()))
        codes = ir.node("QuantizeLinear", [x, scale, zero], name=f"{stem}/inputs/codes")
        inputs = [codes.outputs[0], scale, zero]
        floats = ir.node("DequantizeLinear", inputs, name=f"{stem}/inputs/floats")
        for node, kind in ((codes, ir.TensorType(CODES[str(form)])), (floats, x.type)):
            node.outputs[0].name, node.outputs[0].shape = node.name, x.shape
            node.outputs[0].type = kind
        insert_behind(model, x, [codes, floats])
        return codes


def _scale_of(quantize: ir.Node) -> float:
    """The one scale of a QuantizeLinear."""
    scale = quantize.inputs[1]
    assert scale is not None and scale.const_value is not None
    return float(np.asarray(scale.const_value.numpy(), np.float32))


DTYPES_OF = {ir.DataType(d.onnx): getattr(torch, d.torch) for d in DTYPES.values()}
"""torch's dtypes by ONNX's."""

MIDDLE = np.uint8(128)
"""The code of 0."""


def _rounded(model: ir.Model, x: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
    """Codes and scales of a tensor; those that another product has are taken again."""
    for user in x.consumers():
        if user.op_type != "Div" or user.inputs[0] is not x:
            continue
        quantize, found = next(iter(user.outputs[0].consumers()), None), user.inputs[1]
        if quantize is not None and quantize.op_type == "QuantizeLinear":
            assert found is not None
            return quantize.outputs[0], found
    axis = _constant(model, np.array([-1], np.int64))
    step, least = (_constant(model, np.float32(n)) for n in (1 / LARGEST, TINY))
    size = ir.node("Abs", [x], name=f"{name}/abs")
    most = ir.node("ReduceMax", [size.outputs[0], axis], {"keepdims": 1}, name=f"{name}/max")
    scale = ir.node("Mul", [most.outputs[0], step], name=f"{name}/step")
    usable = ir.node("Max", [scale.outputs[0], least], name=f"{name}/scale")
    units = ir.node("Div", [x, usable.outputs[0]], name=f"{name}/units")
    one, middle = _constant(model, np.float32(1)), _constant(model, MIDDLE)
    codes = ir.node("QuantizeLinear", [units.outputs[0], one, middle], name=f"{name}/codes")
    made = [size, most, scale, usable, units, codes]
    for node in made:
        node.outputs[0].name, node.outputs[0].type = node.name, x.type
    for node in (size, units, codes):
        node.outputs[0].shape = x.shape
    codes.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
    insert_behind(model, x, made)
    return codes.outputs[0], usable.outputs[0]


def _constant(model: ir.Model, number: np.generic | NDArray[Any]) -> ir.Value:
    """A small initializer, one for all that read the same number."""
    array = np.asarray(number)
    name = f"integers/{array.dtype}/{'.'.join(map(str, array.ravel().tolist()))}"
    return model.graph.initializers.get(name) or _initializer(model, name, ir.tensor(array))


def _initializer(model: ir.Model, name: str, held: ir.TensorProtocol) -> ir.Value:
    held.name = name
    kind, shape = ir.TensorType(held.dtype), ir.Shape(held.shape.numpy())
    value = ir.Value(name=name, type=kind, shape=shape, const_value=held)
    model.graph.register_initializer(value)
    return value


def _typed(number: NDArray[np.float32], dtype: ir.DataType) -> ir.TensorProtocol:
    """A number in a graph's dtype, which holds it exactly."""
    return ir.tensor(number.astype(dtype.numpy()), dtype=dtype)


INTEGERS: dict[str, ProductForm] = {
    "MatMulIntegerToFloat": ByToken(),
    "QuantizeLinear": ByTensor(),
}
"""By the operator of their inputs' codes."""
