"""What a row of `export.rules` is, and the conditions that such rows are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from edgeprune.export._graph import Graph, Node, attribute

Version = tuple[int, ...]
Since = Mapping[str, Version | None]  # by engine; one that is not named always took it


@dataclass(frozen=True)
class Rule:
    """What versions before `since` refuse: nodes of these operators that are `broken`."""

    operators: tuple[str, ...]
    message: str
    broken: Callable[[Graph, Node], bool]
    since: Since
    source: str
    gpu: Version | None = None  # the least compute capability that takes it, in any version


Condition = Callable[[Graph, Node], bool]
NEVER: Since = {"trt": None, "rtx": None}


def given(*indices: int) -> Condition:
    return lambda graph, node: any(graph.given(node, index) for index in indices)


def returned(*indices: int) -> Condition:
    return lambda graph, node: any(p < len(node.output) and node.output[p] for p in indices)


def is_set(name: str, usual: object) -> Condition:
    return lambda graph, node: attribute(node, name, usual) != usual


def computed(index: int) -> Condition:
    return lambda graph, node: not graph.constant(graph.given(node, index))


def rank_not(wanted: int, *indices: int) -> Condition:
    def broken(graph: Graph, node: Node) -> bool:
        ranks = (graph.rank(graph.given(node, index)) for index in indices)
        return any(rank not in (None, wanted) for rank in ranks)

    return broken


def typed(index: int, *kinds: int) -> Condition:
    return lambda graph, node: graph.types.get(graph.given(node, index)) in kinds


def is_zero(graph: Graph, name: str) -> bool:
    """Whether a small constant holds only zeros; an input that is left out counts as zeros."""
    tensor = graph.tensors.get(name)
    if not name:
        return True
    if tensor is None or tensor.external_data:
        return False
    return not any(tensor.raw_data) and not any(tensor.int32_data)
