"""Where tokens stand once others have left: where they stood, or one behind the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from edgeprune.errors import SpecError
from edgeprune.spec import ModelShape, Plan, Stage

POSITIONS = ("auto", "keep", "renumber")


def with_positions(
    plan: Plan, positions: str, shape: ModelShape, renumbers: Callable[[Stage], bool]
) -> Plan:
    """The plan with the positions that --set positions= names; `auto` is what `renumbers` says.

    Under M-RoPE, where a token has its row and column, no position changes; nor where all tokens
    of an image have one.
    """
    if positions not in POSITIONS:
        raise SpecError(f"--set positions= is one of {', '.join(POSITIONS)}; got {positions!r}")
    fixed = "three (M-RoPE)" if shape.mrope else "one an image" if shape.one_position else ""
    if positions == "renumber" and fixed:
        raise SpecError(
            f"--set positions=renumber needs one position a token, this model has {fixed};"
            " leave it out or set positions=keep"
        )
    if fixed:
        return plan

    def moves(stage: Stage) -> bool:
        return renumbers(stage) if positions == "auto" else positions == "renumber"

    return replace(plan, stages=tuple(replace(s, renumber=moves(s)) for s in plan.stages))
