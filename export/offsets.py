"""The second product of weights whose codes have zero points, for engines that take none.

A block of inputs has one zero point an output, so what zero points add to a product is exactly

    x ((codes - zeros) * scales) = x (codes * scales) + sums(x) offsets
    offsets = -zeros * scales                                               [blocks, N]

sums(x) [.., blocks] adds up the inputs of each block: a product with a matrix of zeros and ones,
made once for all products that read x.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir


def add_offsets(model: ir.Model, matmul: ir.Node, offsets: ir.Value) -> None:
    """Let what reads a product of codes read its sum with the product of offsets."""
    codes, stem = matmul.outputs[0], "/".join((matmul.name or "").split("/")[:-1])
    sums = _sums(model, matmul, stem, offsets)
    second = ir.node("MatMul", [sums, offsets], name=f"{stem}/offsets")
    whole = ir.node("Add", [codes, second.outputs[0]], name=f"{stem}/whole")
    for node in (second, whole):
        node.outputs[0].name = node.name
        node.outputs[0].shape, node.outputs[0].type = codes.shape, codes.type
    ir.convenience.replace_all_uses_with(codes, whole.outputs[0], replace_graph_outputs=True)
    whole.replace_input_with(0, codes)
    model.graph.insert_after(matmul, [second, whole])
    name, codes.name = codes.name, f"{stem}/codes"
    whole.outputs[0].name = name


def insert_behind(model: ir.Model, x: ir.Value, made: Sequence[ir.Node]) -> None:
    """Put nodes where a tensor is there and no user of it has come yet."""
    if (producer := x.producer()) is not None:
        model.graph.insert_after(producer, made)
    else:
        model.graph.insert_before(model.graph[0], made)


def _sums(model: ir.Model, matmul: ir.Node, stem: str, offsets: ir.Value) -> ir.Value:
    """The sums of a product's inputs by block; those that another product has are taken again."""
    x, weight = matmul.inputs
    assert x is not None and x.shape is not None
    assert weight is not None and weight.shape is not None and offsets.shape is not None
    inputs, blocks = weight.shape.numpy()[0], offsets.shape.numpy()[0]
    ones = _ones(model, inputs, blocks, offsets.dtype)
    for user in x.consumers():
        if user.op_type == "MatMul" and user.inputs[1] is ones:
            return user.outputs[0]
    made = ir.node("MatMul", [x, ones], name=f"{stem}/sums")
    found = made.outputs[0]
    found.name, found.type = made.name, x.type
    found.shape = ir.Shape([*x.shape[:-1], blocks])
    insert_behind(model, x, [made])
    return found


def _ones(model: ir.Model, inputs: int, blocks: int, dtype: ir.DataType | None) -> ir.Value:
    """[inputs, blocks]: 1 where an input is of a block, one for all products of these sizes."""
    assert dtype is not None
    name = f"sums/{dtype.name.lower()}/{inputs}/{blocks}"
    if (found := model.graph.initializers.get(name)) is not None:
        return found
    matrix = np.repeat(np.eye(blocks), inputs // blocks, axis=0).astype(dtype.numpy())
    held = ir.tensor(matrix, dtype=dtype, name=name)
    made = ir.Value(
        name=name, type=ir.TensorType(dtype), shape=ir.Shape(matrix.shape), const_value=held
    )
    model.graph.register_initializer(made)
    return made
