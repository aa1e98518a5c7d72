"""A float32 copy of a half-precision pair of graphs, its weights still rounded.

ONNX Runtime's CPU provider has no bf16 kernels and keeps float32 between many fp16 nodes. The copy
has the same nodes, so it shows whether structure and weights are right, with nothing left to
rounding.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgeprune.export.passes import HALF


def upcast(source: Path, folder: Path) -> None:
    """Write vision.onnx and decoder.onnx of the bundle `source` into `folder`, in float32."""
    for name in ("vision", "decoder"):
        model = ir.load(source / f"{name}.onnx")
        graph = model.graph
        _widen(graph.inputs)
        _widen(graph.initializers.values())
        for node in graph:
            _widen(node.outputs)
            for attribute in list(node.attributes.values()):
                node.attributes[attribute.name] = _widened(attribute)
        ir.save(model, folder / f"{name}.onnx", external_data=f"{name}.bin")


def _widen(values: Iterable[ir.Value]) -> None:
    for value in values:
        if value.dtype in HALF:
            value.dtype = ir.DataType.FLOAT
        if value.const_value is not None:
            value.const_value = _wide(value.const_value)


def _widened(attribute: ir.Attr) -> ir.Attr:
    if attribute.type == ir.AttributeType.TENSOR:
        return ir.AttrTensor(attribute.name, _wide(attribute.as_tensor()))
    if attribute.name == "to" and attribute.as_int() in HALF:  # of Cast
        return ir.AttrInt64("to", ir.DataType.FLOAT)
    return attribute


def _wide(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The same numbers in float32, converted when they are written."""
    if tensor.dtype not in HALF:
        return tensor
    return ir.LazyTensor(
        lambda: ir.tensor(tensor.numpy().astype(np.float32)),
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape(tensor.numpy().shape),
        name=tensor.name,
    )
