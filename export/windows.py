"""A graph cut at its layers into parts that ONNX Runtime runs one after another.

The hidden states between layers have names (trace.py), so a graph with n layers has n + 2 stages:
what comes before the first layer, each layer, and what comes after the last. A window is a run of
stages. What goes from one window to the next is found in the graph: every value that is made in one
and read in a later one. Weights stay in the bundle's weights file, where each window reads its own.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import onnx
from onnx import helper

from edgeprune.errors import ExportError
from edgeprune.export.trace import HIDDEN
from edgeprune.graphs import GraphRecord

Node = Any  # onnx.NodeProto; onnx has no types of its own


@dataclass(frozen=True)
class Window:
    """Some stages of a graph; names of values by what they are."""

    stages: range
    nodes: tuple[Node, ...]
    initializers: tuple[str, ...]
    inputs: tuple[str, ...]  # of the graph
    carried: tuple[str, ...]  # made in windows before, and needed here
    given: tuple[str, ...]  # outputs of the graph and hidden states that are due in these stages
    outputs: tuple[str, ...]  # what is made here, and given or carried on


class Cut:
    """Where the nodes of a graph belong."""

    def __init__(self, model: Any, record: GraphRecord) -> None:
        self.model, self.record = model, record
        graph = model.graph
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.makers = {name: node for node in graph.node for name in node.output if name}
        hidden = [name for name in self.makers if number_of(name) is not None]
        self.stages = len(hidden) + 1
        self._constants = set(self.initializers)
        self._stage = {tensor.name: self.due(tensor.name) for tensor in record.inputs}
        self._placed: dict[int, list[Node]] = defaultdict(list)
        for node in graph.node:
            self._place(node)

    def _place(self, node: Node) -> None:
        if any(attribute.HasField("g") for attribute in node.attribute):
            raise ExportError(f"{node.name} of the traced graph has a graph of its own")
        read = [name for name in node.input if name]
        if self._constants.issuperset(read):
            self._constants.update(node.output)
            return
        stage = max(self._stage[name] for name in read if name not in self._constants)
        self._placed[stage].append(node)
        for name in node.output:
            number = number_of(name)
            self._stage[name] = stage if number is None else number + 1

    @cached_property
    def _due(self) -> dict[str, int]:
        """The stage in which each input is first read, or output given."""
        layers = self.stages - 2
        due = {tensor.name: 0 for tensor in self.record.inputs}
        due |= {tensor.name: layers + 1 for tensor in self.record.outputs}
        for tensor in (*self.record.inputs, *self.record.outputs):
            if tensor.layer is not None:
                due[tensor.name] = tensor.layer - (tensor.role == "kept")
        return due

    def due(self, name: str) -> int:
        """The stage of a value: an input is read there first, an output or hidden states are
        given."""
        number = number_of(name)
        return self._due[name] if number is None else number

    def windows(self, groups: Sequence[range]) -> list[Window]:
        """The graph in windows of these stages, which follow each other."""
        given = [self._given(stages) for stages in groups]
        made = [[node for stage in stages for node in self._placed[stage]] for stages in groups]
        found, later = list[Window](), set[str]()
        for stages, nodes, wanted in reversed(list(zip(groups, made, given, strict=True))):
            own = {name for node in nodes for name in node.output}
            needed = {name for node in nodes for name in node.input if name} | set(wanted)
            constant = [name for name in needed if name in self._constants]
            nodes, initializers = self._with_constants(nodes, constant)
            outside = {name for name in needed - own if name not in self._constants}
            inputs = [t.name for t in self.record.inputs if t.name in outside]
            carried = sorted(outside - set(inputs))
            on = sorted(name for name in later & own if name not in wanted)
            made_here = [name for name in wanted if name not in carried]
            names = tuple(initializers), tuple(inputs), tuple(carried), tuple(wanted)
            found.append(Window(stages, tuple(nodes), *names, (*made_here, *on)))
            later |= set(carried)
        return found[::-1]

    def _given(self, stages: range) -> list[str]:
        """Outputs of the graph and hidden states that a window of these stages gives."""
        wanted = [t.name for t in self.record.outputs if t.role != "token"]
        wanted += [f"{HIDDEN}{number}" for number in range(self.stages - 1)]
        return [name for name in wanted if self.due(name) in stages]

    def _with_constants(
        self, nodes: Sequence[Node], names: Iterable[str]
    ) -> tuple[list[Node], list[str]]:
        """The nodes after those that make these constants, and the initializers of all."""
        made, initializers, todo = dict[str, Node](), set[str](), list(names)
        while todo:
            name = todo.pop()
            if name in self.initializers:
                initializers.add(name)
            elif name not in made:
                node = self.makers[name]
                made.update(dict.fromkeys(node.output, node))
                todo += [read for read in node.input if read]
        before = {id(node) for node in made.values()}
        constants = [node for node in self.model.graph.node if id(node) in before]
        return [*constants, *nodes], [n for n in self.initializers if n in initializers]

    def proto(self, window: Window, types: Mapping[str, int]) -> bytes:
        """A window as a graph of its own; `types` are the element types of what was carried."""
        given = {value.name: value for value in self.model.graph.input}
        read = {name for node in window.nodes for name in node.input}
        open_ends = {name: types[name] for name in window.carried if name in read}
        graph = helper.make_graph(
            window.nodes,
            "window",
            [
                *(given[name] for name in window.inputs),
                *(helper.make_tensor_value_info(n, kind, None) for n, kind in open_ends.items()),
            ],
            [onnx.ValueInfoProto(name=name) for name in window.outputs],
            [self.initializers[name] for name in window.initializers],
        )
        made = helper.make_model(graph, opset_imports=self.model.opset_import)
        made.ir_version = self.model.ir_version
        data: bytes = made.SerializeToString()
        return data


def number_of(name: str) -> int | None:
    """Of hidden states, of which layer's entrance they are."""
    found = re.fullmatch(re.escape(HIDDEN) + r"(\d+)", name)
    return int(found[1]) if found else None
