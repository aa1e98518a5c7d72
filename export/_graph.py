"""An ONNX graph as the rules of `export.rules` look at it: who makes a value, its type and rank.

The graph may come from anybody. So it is read in one pass over its nodes, and of other files only
those in its own folder are read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, shape_inference

from edgeprune.files import real

Node = Any  # onnx.NodeProto; onnx has no types of its own

WHOLE = {TensorProto.INT64: ("<i8", "int64_data"), TensorProto.INT32: ("<i4", "int32_data")}
"""Element types of sizes: how their bytes are read, and where a tensor may list them instead."""
SIZES = 1024
"""Numbers of a tensor that may hold sizes, at most; what is longer is a table."""
PASSING = ("Reshape", "Squeeze", "Unsqueeze", "Cast", "Identity")
"""Operators that give a size on as it is."""


@dataclass
class Graph:
    """A model, the bodies of its If, Loop and Scan nodes too; its values looked up by name."""

    opset: int
    nodes: list[Node]
    domains: set[str]
    inputs: set[str]
    outputs: set[str]
    makers: dict[str, Node]
    tensors: dict[str, Any]  # initializers and what Constant nodes hold, by name
    types: dict[str, int] = field(default_factory=dict)  # TensorProto.DataType
    shapes: dict[str, tuple[int | str | None, ...]] = field(default_factory=dict)

    constants: set[str] = field(default_factory=set)  # values that are made of constants alone
    largest: dict[str, int] = field(default_factory=dict)  # of sizes, where that is known

    @classmethod
    def of(cls, model: Any, folder: Path | None = None) -> Graph:
        """Read a model. Its weights need not be loaded; tensors of sizes are read from `folder`.

        Where ONNX finds that types contradict each other, they are taken as the file has them.
        """
        with suppress(Exception):  # of C++, in as many kinds as it has
            model = shape_inference.infer_shapes(model)
        graph = model.graph
        parts = list(_with_bodies(graph))
        nodes = [node for part in parts for node in part.node]
        tensors = {tensor.name: tensor for part in parts for tensor in part.initializer}
        for node in nodes:
            held = attribute(node, "value") if node.op_type == "Constant" else None
            if isinstance(held, TensorProto) and node.output:
                tensors[node.output[0]] = held
        found = cls(
            opset=max((o.version for o in model.opset_import if o.domain == ""), default=0),
            nodes=nodes,
            domains={node.domain for node in nodes},
            inputs={value.name for value in graph.input},
            outputs={value.name for value in graph.output},
            makers={output: node for node in nodes for output in node.output},
            tensors=tensors,
        )
        for part in parts:
            for value in (*part.value_info, *part.input, *part.output):
                found._note(value)
        for name, tensor in tensors.items():
            found.types[name], found.shapes[name] = tensor.data_type, tuple(tensor.dims)
            found.constants.add(name)
            found._keep(name, _numbers(tensor, folder))
        for node in _in_order(nodes, found.makers, tensors):
            found._fold(node)
        return found

    def _note(self, value: Any) -> None:
        kind = value.type.tensor_type
        self.types[value.name] = kind.elem_type
        if kind.HasField("shape"):
            dims = (d.dim_value if d.HasField("dim_value") else d.dim_param for d in kind.shape.dim)
            self.shapes[value.name] = tuple(dims)

    def given(self, node: Node, index: int) -> str:
        """The name of an input, empty where it was left out."""
        return node.input[index] if index < len(node.input) else ""

    def rank(self, name: str) -> int | None:
        return len(self.shapes[name]) if name in self.shapes else None

    def constant(self, name: str) -> bool:
        return not name or name in self.constants

    def most(self, name: str) -> int | None:
        """The largest value that a size can have, where the operators that made it say."""
        return self.largest.get(name)

    def _fold(self, node: Node) -> None:
        """What is known of a node's values, from what is known of its inputs."""
        if node.op_type == "Constant" or (node.input and all(map(self.constant, node.input))):
            self.constants.update(node.output)
        known = [self.largest[name] for name in node.input if name in self.largest]
        if node.op_type == "Min":
            known = [min(known)] if known else []
        elif node.op_type in PASSING:
            known = known[:1] if self.given(node, 0) in self.largest else []
        elif node.op_type != "Concat" or len(known) < len(node.input):
            known = []
        for name in node.output[:1]:
            self._keep(name, known)

    def _keep(self, name: str, known: list[int]) -> None:
        if known:
            self.largest[name] = max(known)


def _in_order(
    nodes: list[Node], makers: dict[str, Node], tensors: dict[str, Any]
) -> Iterator[Node]:
    """The nodes, each after those that make its inputs; those on a cycle never come."""
    users: dict[str, list[int]] = defaultdict(list)
    missing = [0] * len(nodes)
    for number, node in enumerate(nodes):
        for name in node.input:
            if name in makers and name not in tensors:
                users[name].append(number)
                missing[number] += 1
    ready = [number for number, count in enumerate(missing) if not count]
    while ready:
        node = nodes[ready.pop()]
        yield node
        for user in (user for name in node.output for user in users.pop(name, ())):
            missing[user] -= 1
            if not missing[user]:
                ready.append(user)


def _numbers(tensor: Any, folder: Path | None) -> list[int]:
    """The whole numbers of a small tensor, as far as they can be read."""
    if tensor.data_type not in WHOLE or not all(0 < size <= SIZES for size in tensor.dims):
        return []
    kind, listed = WHOLE[tensor.data_type]
    count = prod(tensor.dims)
    if count > SIZES:
        return []
    data: bytes = tensor.raw_data
    if tensor.data_location == TensorProto.EXTERNAL:
        data = _outside(tensor, folder, count * np.dtype(kind).itemsize)
    if not data:
        return [int(number) for number in getattr(tensor, listed)]
    with suppress(ValueError):  # not so many bytes
        return [int(number) for number in np.frombuffer(data, kind, count)]
    return []


def _outside(tensor: Any, folder: Path | None, length: int) -> bytes:
    """Bytes of a tensor in a file beside the graph; none where there is no such file."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if folder is None:
        return b""
    with suppress(OSError, ValueError):
        file = real(folder / entries.get("location", ""))
        if file.is_relative_to(real(folder)) and file.is_file():
            with file.open("rb") as stream:
                stream.seek(int(entries.get("offset", "0")))
                found: bytes = stream.read(length)
                return found
    return b""


def _with_bodies(graph: Any) -> Iterator[Any]:
    """A graph and those inside it; names are unique across all of them."""
    yield graph
    for node in graph.node:
        for entry in node.attribute:
            for body in (entry.g, *entry.graphs) if entry.HasField("g") else entry.graphs:
                yield from _with_bodies(body)


def attribute(node: Node, name: str, default: Any = None) -> Any:
    """An attribute's value."""
    for entry in node.attribute:
        if entry.name == name:
            with suppress(ValueError):  # it has no type, or one that is not known
                return onnx.helper.get_attribute_value(entry)
    return default
