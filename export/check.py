"""`check`: which engines take a graph, and where one does not, which node and which rule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from edgeprune.bundle import Bundle
from edgeprune.errors import BundleError
from edgeprune.export._graph import Graph, Node
from edgeprune.export._rule import NEVER, Version
from edgeprune.export.rules import (
    ADDED,
    OPERATORS,
    OPS_10_15,
    OPSETS,
    RULES,
    TARGETS,
    UNTRIED,
    Target,
)

_LETTERS = {
    "FLOAT": "fh",
    "DOUBLE": "fh",
    "FLOAT16": "fh",
    "BFLOAT16": "f",
    "INT32": "i",
    "INT64": "l",
    "BOOL": "b",
    "UINT8": "u",
    "INT4": "4",
    "INT8": "8",
    "FLOAT8E4M3FN": "3",
}
"""Letters of `rules.OPERATORS` that stand for an element type too."""
_DATA = {"Where": 1, "OneHot": 2}
"""The input whose element type counts, where it is not the first."""


@dataclass(frozen=True)
class Problem:
    """A node that is refused, the rule, the first version of the same engine that takes it."""

    node: str
    message: str
    source: str
    since: dict[str, Version | None]
    gpu: Version | None = None  # the least compute capability that takes it

    def refused_by(self, target: Target) -> bool:
        if self.gpu is not None and target.gpu is not None and target.gpu < self.gpu:
            return True
        if target.engine not in self.since:
            return False
        since = self.since[target.engine]
        return since is None or target.version < since


@dataclass(frozen=True)
class Verdict:
    """What one version says of one graph; `first` is the first version that takes it, if known."""

    target: Target
    problems: tuple[Problem, ...]
    first: Version | None
    doubts: tuple[str, ...] = ()  # what should be taken, and was never tried

    @property
    def accepted(self) -> bool:
        return not self.problems


def check_bundle(path: Path | str) -> dict[str, list[Verdict]]:
    """What every target says of all graphs of a bundle, by file name; BundleError where it is
    none."""
    bundle = Bundle.open(path)
    return {name: check_graph(bundle.file(name)) for name in bundle.manifest.graphs}


def check_graph(file: Path) -> list[Verdict]:
    """What every target says of an ONNX file; its weights are not read.

    BundleError where the file is no ONNX model.
    """
    try:
        model = onnx.load(file, format="protobuf", load_external_data=False)
    except DecodeError as error:
        raise BundleError(f"{file} is no ONNX model ({error}); export it again") from error
    if not model.graph.node:
        raise BundleError(f"{file} is no ONNX model (it has no nodes); export it again")
    return check_model(model, file.parent)


def check_model(model: Any, folder: Path | None = None) -> list[Verdict]:
    """What every target says of a model, whose weights need not be loaded.

    `folder` is where its external data lie: sizes are read from there, weights never.
    """
    graph = Graph.of(model, folder)
    problems = list(find(graph))
    return [
        Verdict(
            target,
            tuple(p for p in problems if p.refused_by(target)),
            _first(problems, target.engine),
            tuple(_doubts(graph, target, problems)),
        )
        for target in TARGETS
    ]


def _doubts(graph: Graph, target: Target, problems: list[Problem]) -> Iterator[str]:
    for row in UNTRIED:
        if (target.engine, graph.opset) == (row.engine, row.opset) and target.version < row.before:
            yield f"{row.message} [{row.source}]"
    if target.engine != "ort" and target.gpu is None:
        for message, source in dict.fromkeys((p.message, p.source) for p in problems if p.gpu):
            yield f"{message} [{source}]"


def find(graph: Graph) -> Iterator[Problem]:
    """Everything that some version refuses."""
    yield from _opset(graph)
    for number, node in enumerate(graph.nodes):
        name = node.name or next(iter(node.output), "") or f"node {number}"
        location = f"{name} ({node.op_type})"
        types = OPERATORS.get(node.op_type, "")
        if node.domain or not types:
            operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            message = f"{operator} is no operator that the parser knows"
            yield Problem(location, message, OPS_10_15, dict(NEVER))
            continue
        if node.op_type in ADDED:
            since, source = ADDED[node.op_type]
            yield Problem(location, f"{node.op_type} is not known yet", source, dict(since))
        kind = _data_type(graph, node)
        if kind and not set(_LETTERS.get(kind, "")) & set(types):
            message = f"{node.op_type} takes no {kind.lower()}"
            yield Problem(location, message, OPS_10_15, dict(NEVER))
        for rule in RULES:
            if node.op_type in rule.operators and rule.broken(graph, node):
                message = f"{node.op_type} {rule.message}"
                yield Problem(location, message, rule.source, dict(rule.since), rule.gpu)


def _opset(graph: Graph) -> Iterator[Problem]:
    for engine, steps in OPSETS.items():
        taking = [(version, source) for version, newest, source in steps if newest >= graph.opset]
        since, source = taking[0] if taking else (None, steps[-1][2])
        yield Problem("the graph", f"opset {graph.opset} is too new", source, {engine: since})


def _data_type(graph: Graph, node: Node) -> str:
    """The name of the element type that a node works on, empty where it is not known."""
    name = graph.given(node, _DATA.get(node.op_type, 0)) or next(iter(node.output), "")
    number = graph.types.get(name, 0)
    if number not in onnx.TensorProto.DataType.values():
        return f"element type {number}"
    return str(onnx.TensorProto.DataType.Name(number)) if number else ""


def _first(problems: list[Problem], engine: str) -> Version | None:
    """The first version of an engine that refuses nothing; None where none is known."""
    needed = [p.since[engine] for p in problems if engine in p.since]
    if None in needed:
        return None
    return max((v for v in needed if v is not None), default=OPSETS[engine][0][0])
