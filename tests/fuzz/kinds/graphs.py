"""Graphs altered node by node, the hashes in the manifest mended; single ONNX files for `check`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import onnx
from onnx import GraphProto as Graph
from onnx import TensorProto, helper

from tests.fuzz.case import Case, reader
from tests.fuzz.kinds.manifests import ask
from tests.fuzz.kinds.tokenizers import mend
from tests.fuzz.mutate import INTEGERS, STRINGS, damage
from tests.fuzz.seeds import Seeds

WEIGHT = 20

SMALL = tuple(number for number in INTEGERS if -(2**63) <= number < 2**63)


def make(rng: Random, seeds: Seeds, folder: Path) -> Case:
    bundle = Path(shutil.copytree(rng.choice(seeds.bundles), folder / "bundle"))
    file = bundle / rng.choice(["decoder.onnx", "decoder.onnx", "vision.onnx", "join.onnx"])
    if rng.random() < 0.1:
        content, note = damage(file.read_bytes(), rng)
        file.write_bytes(content)
    else:
        model = onnx.load(str(file), load_external_data=False)
        notes = []
        for _ in range(rng.choice([1, 1, 2])):
            way = rng.choice(WAYS)
            try:
                notes.append(f"{way.__name__}: {way(model.graph, rng, bundle)}")
            except (IndexError, ValueError):  # nothing left of that sort
                notes.append("nothing")
        if rng.random() < 0.05:
            model.opset_import[0].version = rng.choice([0, 1, 7, 99, 2**40])
        if rng.random() < 0.05:
            model.ir_version = rng.choice([0, 1, 99, 2**40])
        file.write_bytes(model.SerializeToString())
        note = f"{file.name}, {'; '.join(notes)}"
    mend(bundle)
    run = _checked(file) if rng.random() < 0.3 else ask(bundle, seeds, rng, folder)
    return Case(run, note, True)


def _checked(file: Path) -> Callable[[], int]:
    """The look-up of one ONNX file in the table of what engines take."""
    from edgeprune.export.check import check_graph

    return reader(lambda: check_graph(file))


def _node(graph: Graph, rng: Random) -> onnx.NodeProto:
    return graph.node[rng.randrange(len(graph.node))]


def attribute(graph: Graph, rng: Random, _: Path) -> str:
    with_any = [node for node in graph.node if node.attribute]
    node = rng.choice(with_any)
    one = rng.choice(list(node.attribute))
    way = rng.choice(["value", "value", "drop", "type", "tensor"])
    if way == "drop":
        node.attribute.remove(one)
    elif way == "type":
        one.type = rng.choice([0, 1, 2, 3, 4, 6, 7, 8, 10, 14])
    elif way == "tensor" and one.HasField("t"):
        one.t.CopyFrom(_tensor(rng))
    else:
        one.i, one.f = rng.choice(SMALL), rng.choice([0.0, -1.0, 1e30, float("nan")])
        if one.ints:
            one.ints[rng.randrange(len(one.ints))] = rng.choice(SMALL)
        if one.s:
            one.s = rng.choice(STRINGS).encode(errors="replace")
    return f"{way} of {one.name} in {node.op_type}"


def _tensor(rng: Random) -> TensorProto:
    """A small constant that says more than it holds, or lies in another file."""
    tensor = helper.make_tensor("x", TensorProto.INT64, [2], [rng.choice(SMALL), rng.choice(SMALL)])
    way = rng.choice(["values", "dims", "type", "outside"])
    if way == "dims":
        tensor.dims[:] = rng.choice([[2**40], [-1], [2**31, 2**31], [0], []])
    elif way == "type":
        tensor.data_type = rng.choice([0, 1, 8, 17, 99, 2**20])
    elif way == "outside":
        _outside(tensor, rng.choice(["size", "../x", "/etc/passwd", "x.bin"]), 0, 16)
    return tensor


def _outside(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    tensor.ClearField("int64_data")
    tensor.ClearField("raw_data")
    del tensor.external_data[:]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)


def weight(graph: Graph, rng: Random, bundle: Path) -> str:
    tensor = rng.choice(list(graph.initializer))
    way = rng.choice(["dims", "type", "location", "offset", "length", "link", "inline", "name"])
    if way == "dims" and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(SMALL)
    elif way == "type":
        tensor.data_type = rng.choice([0, 1, 6, 7, 10, 16, 99])
    elif way == "name":
        tensor.name = rng.choice(["", "pixels", "logits", "nosuch"])
    elif way == "inline":
        tensor.CopyFrom(_tensor(rng))
    elif tensor.external_data:
        entries = {entry.key: entry for entry in tensor.external_data}
        if way == "link":
            copy = bundle / "more.bin"
            if not copy.exists():
                rng.choice([os.link, os.symlink, shutil.copyfile])(bundle / "weights.bin", copy)
            entries["location"].value = "more.bin"
        elif way == "location":
            entries["location"].value = rng.choice(
                ["../x", "/etc/passwd", "manifest.json", "", "a\0"]
            )
        elif way in entries:
            entries[way].value = str(rng.choice(SMALL))
    return f"{way} of {tensor.name[:40]}"


def rewire(graph: Graph, rng: Random, _: Path) -> str:
    node, other = _node(graph, rng), _node(graph, rng)
    way = rng.choice(["cycle", "self", "swap", "input", "empty", "fewer", "more", "no outputs"])
    if way == "self":
        node.input[0] = node.output[0]
    elif way in ("cycle", "input"):
        node.input[rng.randrange(len(node.input))] = other.output[0]
    elif way == "swap":
        node.input[:] = list(node.input)[::-1]
    elif way == "empty":
        node.input[rng.randrange(len(node.input))] = ""
    elif way == "fewer":
        del node.input[-1]
    elif way == "more":
        node.input.extend(list(node.input) * rng.choice([1, 999]))
    else:
        del node.output[:]
    return f"{way} of {node.op_type}"


def nodes(graph: Graph, rng: Random, _: Path) -> str:
    at = rng.randrange(len(graph.node))
    node, way = graph.node[at], rng.choice(["drop", "twice", "kind", "domain", "move", "last"])
    kind = node.op_type
    if way == "drop":
        del graph.node[at]
    elif way == "twice":
        graph.node.add().CopyFrom(node)
    elif way == "kind":
        node.op_type = rng.choice(
            [_node(graph, rng).op_type, *["Loop", "If", "Scan", "NonZero", "Nosuch"], ""]
        )
    elif way == "domain":
        node.domain = rng.choice(
            ["com.microsoft", "ai.onnx.ml", "nosuch", "ai.onnx.preview.training"]
        )
    elif way == "move":
        other = rng.randrange(len(graph.node))
        held = onnx.NodeProto()
        held.CopyFrom(node)
        node.CopyFrom(graph.node[other])
        graph.node[other].CopyFrom(held)
    else:
        del graph.node[at:]
    return f"{way} of {kind}"


def ends(graph: Graph, rng: Random, _: Path) -> str:
    values = rng.choice([graph.input, graph.output, graph.value_info or graph.input])
    at = rng.randrange(len(values))
    value, way = (
        values[at],
        rng.choice(["name", "type", "dims", "drop", "twice", "rank", "no type"]),
    )
    if way == "name":
        value.name = rng.choice(["", "nosuch", values[0].name, "\x1b[31m"])
    elif way == "type":
        value.type.tensor_type.elem_type = rng.choice([0, 1, 7, 8, 9, 10, 16, 99])
    elif way == "dims" and value.type.tensor_type.shape.dim:
        rng.choice(list(value.type.tensor_type.shape.dim)).dim_value = rng.choice(SMALL)
    elif way == "drop":
        del values[at]
    elif way == "twice":
        values.add().CopyFrom(value)
    elif way == "rank":
        value.type.tensor_type.shape.dim.add().dim_value = rng.choice([0, 1, 2**40])
    else:
        value.ClearField("type")
    return f"{way} of {value.name[:30]!r}"


def planted(graph: Graph, rng: Random, bundle: Path) -> str:
    """One of the ways in which graphs were seen to harm a reader."""
    return rng.choice(PLANTED)(graph, rng, bundle)


def _feeds(graph: Graph, *made: onnx.NodeProto) -> None:
    """Nodes before all others."""
    held = [onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node]
    del graph.node[:]
    graph.node.extend([*made, *held])


def _constant(name: str, values: list[int]) -> onnx.NodeProto:
    tensor = helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
    return helper.make_node("Constant", [], [name], value=tensor)


def chained(graph: Graph, rng: Random, _: Path) -> str:
    """Sums that double at every step, into the k of a TopK."""
    length = rng.choice([20, 60, 400])
    made = [_constant("add0", [1])]
    made += [helper.make_node("Add", [f"add{n}"] * 2, [f"add{n + 1}"]) for n in range(length)]
    top = [node for node in graph.node if node.op_type == "TopK"]
    if top:
        top[0].input[1] = f"add{length}"
    else:
        made.append(helper.make_node("TopK", [graph.input[0].name, f"add{length}"], ["v", "i"]))
    _feeds(graph, *made)
    return f"{length} sums"


def cycle(graph: Graph, rng: Random, _: Path) -> str:
    _feeds(
        graph,
        helper.make_node("Add", ["b", "b"], ["a"]),
        helper.make_node("Add", ["a", "a"], ["b"]),
    )
    return "two nodes feed each other"


def bare(graph: Graph, rng: Random, _: Path) -> str:
    _feeds(graph, helper.make_node("Constant", [], ["bare"]))
    return "a Constant without a value"


def huge(graph: Graph, rng: Random, _: Path) -> str:
    size = rng.choice([[2**31], [40_000, 40_000], [2**40]])
    value = helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0])
    first = graph.input[0].name
    made = [
        _constant("size", size),
        helper.make_node("ConstantOfShape", ["size"], ["block"], value=value),
        helper.make_node("ReduceMax", ["block"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["cast"], to=graph.input[0].type.tensor_type.elem_type),
        helper.make_node("Mul", [first, "cast"], ["scaled"]),
    ]
    for node in graph.node:
        node.input[:] = ["scaled" if name == first else name for name in node.input]
    _feeds(graph, *made)
    return f"a block of {size}"


def endless(graph: Graph, rng: Random, _: Path) -> str:
    """A Loop of 2^62 steps before the first node."""
    first, kind = graph.input[0].name, graph.input[0].type.tensor_type.elem_type
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["went"]),
            helper.make_node("Identity", ["x"], ["y"]),
        ],
        "body",
        [info("n", TensorProto.INT64, []), info("go", TensorProto.BOOL, []), info("x", kind, None)],
        [info("went", TensorProto.BOOL, []), info("y", kind, None)],
    )
    truth = helper.make_tensor("t", TensorProto.BOOL, [], [True])
    steps = helper.make_tensor("s", TensorProto.INT64, [], [rng.choice([3, 2**62])])
    for node in graph.node:
        node.input[:] = ["looped" if name == first else name for name in node.input]
    _feeds(
        graph,
        helper.make_node("Constant", [], ["truth"], value=truth),
        helper.make_node("Constant", [], ["steps"], value=steps),
        helper.make_node("Loop", ["steps", "truth", first], ["looped"], body=body),
    )
    return "a Loop"


def elsewhere(graph: Graph, rng: Random, bundle: Path) -> str:
    """The size of a Reshape in another file, relative to whatever folder is read."""
    tensor = helper.make_tensor("elsewhere", TensorProto.INT64, [1], [1])
    _outside(tensor, "manifest.json", 0, 8)
    graph.initializer.append(tensor)
    shapes = [node for node in graph.node if node.op_type in ("Reshape", "Expand")]
    rng.choice(shapes).input[1] = "elsewhere"
    return "a size in external data"


def nested(graph: Graph, rng: Random, _: Path) -> str:
    """Branches within branches."""
    inner = helper.make_graph([], "leaf", [], [])
    for depth in range(rng.choice([3, 60])):
        node = helper.make_node("If", ["c"], [f"o{depth}"], then_branch=inner, else_branch=inner)
        inner = helper.make_graph([node], f"g{depth}", [], []) if depth < 8 else inner
    _feeds(graph, *inner.node)
    return "nested branches"


PLANTED = (chained, cycle, bare, huge, endless, elsewhere, nested)
WAYS: tuple[Callable[[Graph, Random, Path], str], ...] = (
    attribute,
    attribute,
    weight,
    weight,
    rewire,
    rewire,
    nodes,
    ends,
    planted,
)
