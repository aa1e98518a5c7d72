"""What the tracer assumed about a graph's dynamic sizes, compared with the calls that will be made.

torch.export decides every question about a size by its example, and keeps the answers as guards. A
size that is 1 in the example but 0 in a decode step is then frozen as 1, and the graph is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram

from edgeprune.errors import ExportError

Sizes = Mapping[tuple[str, int], int]
"""The dynamic sizes of one call, by the name of an input and the axis."""


def check_sizes(program: ExportedProgram, calls: Sequence[Sizes]) -> None:
    """ExportError where the traced program takes two sizes as equal that differ in a call.

    Sizes that a call does not name may be anything. The tracer also assumes that a size is at least
    1, where it asks about memory layouts: max(1, size) = size. That changes no operator, so it is
    ignored.
    """
    symbols = _symbols(program)
    for guard in _guards(program):
        if guard.func.__name__ != "Equality" or _is_layout(guard):
            continue
        for call in calls:
            known = {symbols[axis]: size for axis, size in call.items() if axis in symbols}
            if guard.subs(known) == False:  # noqa: E712  # sympy's, which is no bool
                sizes = ", ".join(f"{name} {size}" for (name, _), size in call.items())
                raise ExportError(
                    f"the tracer froze a size of the graph ({guard}), which is another where a"
                    f" call has {sizes}; nothing was written. Please report the model and the"
                    " command"
                )


def _symbols(program: ExportedProgram) -> dict[tuple[str, int], Any]:
    """The symbol of each dynamic axis of the inputs."""
    names = set(program.graph_signature.user_inputs)
    return {
        (node.name, axis): size.node.expr
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in names
        for axis, size in _dynamic(node.meta.get("val"))
    }


def _dynamic(value: object) -> Iterator[tuple[int, Any]]:
    """The dynamic axes of a traced tensor and their sizes."""
    if isinstance(value, torch.Tensor):
        sizes: Sequence[object] = value.shape
        yield from ((n, size) for n, size in enumerate(sizes) if isinstance(size, torch.SymInt))


def _guards(program: ExportedProgram) -> list[Any]:
    """What the tracer decided, as sympy relations; none where nothing is dynamic."""
    for node in program.graph.nodes:
        for _, size in _dynamic(node.meta.get("val")):
            return [guard.expr for guard in size.node.shape_env.guards]
    return []


def _is_layout(guard: Any) -> bool:
    """Whether it is max(1, size) = size."""
    one, other = guard.args
    return any(
        a.func.__name__ == "Max" and set(a.args) == {1, b} for a, b in ((one, other), (other, one))
    )
