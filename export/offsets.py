"""The second product of weights whose codes have zero points, for engines that take none.

A block of inputs has one zero point an output, so what zero points add to a product is exactly

    x ((codes - zeros) * scales) = x (codes * scales) + sums(x) offsets
    offsets = -zeros * scales                                               [blocks, N]

sums(x) [.., blocks] adds up the inputs of each block, once for all products that read x, by Reshape
and ReduceSum. A product with a matrix of zeros and ones would be an engine's too; it was measured
with TensorRT-RTX, has more code, and that matrix would be read in each decode step.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    given = x.shape[:-1]
    sizes = _constant(model, [*(0 for _ in given), blocks, inputs // blocks])  # 0: as it is
    for user in x.consumers():
        if user.op_type == "Reshape" and user.inputs[1] is sizes:
            (found,) = user.outputs[0].consumers()
            return found.outputs[0]
    apart = ir.node("Reshape", [x, sizes], name=f"{stem}/blocks")
    read = [apart.outputs[0], _constant(model, [-1])]
    sums = ir.node("ReduceSum", read, {"keepdims": 0}, name=f"{stem}/sums")
    apart.outputs[0].shape = ir.Shape([*given, blocks, inputs // blocks])
    sums.outputs[0].shape = ir.Shape([*given, blocks])
    for node in (apart, sums):
        node.outputs[0].name, node.outputs[0].type = node.name, x.type
    insert_behind(model, x, [apart, sums])
    return sums.outputs[0]


def _constant(model: ir.Model, numbers: Sequence[int]) -> ir.Value:
    """An initializer int64 [n], one for all that read the same numbers."""
    name = f"blocks/{'.'.join(map(str, numbers))}"
    if (found := model.graph.initializers.get(name)) is not None:
        return found
    held = ir.tensor(numbers, dtype=ir.DataType.INT64, name=name)
    kind, shape = ir.TensorType(ir.DataType.INT64), ir.Shape([len(numbers)])
    made = ir.Value(name=name, type=kind, shape=shape, const_value=held)
    model.graph.register_initializer(made)
    return made
