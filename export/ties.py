"""Whether two engines that chose other tokens at a site did so by rounding.

Two engines round differently, so they may choose differently between tokens whose scores are nearly
equal. To know whether that happened, the reference's layer in which they first differ is run again,
with inputs that are changed by as much as rounding changes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from edgeprune.models._stages import DialogueState, ImageState, Stages

TOLERANCE = 1e-4
"""Largest difference of two values, as a share of the largest of them."""

TINY = 1e-30
"""What is smaller than this counts as nothing."""

NUDGES = 192
"""So many times inputs are changed by rounding before a difference is called one: where a greedy
order has gone down to little, one in twenty was seen to turn a choice as another engine does."""

S = TypeVar("S", ImageState, DialogueState)


@dataclass(frozen=True)
class Given:
    """What an engine gives at a stage."""

    shown: tuple[Tensor, ...]  # of each call: hidden states, visual tokens or logits
    chosen: tuple[Tensor, ...]  # indices of the survivors, where tokens are dropped or merged

    @classmethod
    def of(cls, after: ImageState | DialogueState, before: ImageState | DialogueState) -> Given:
        """What the reference gave at the stage between two of its states."""
        return cls(after.shown, after.chosen[len(before.chosen) :])

    def keeps_as(self, other: Given) -> bool:
        """Whether the survivors have the same indices."""
        return all(map(torch.equal, self.chosen, other.chosen))

    def apart(self, other: Given) -> float:
        """The largest difference of what is shown."""
        return max(map(difference, self.shown, other.shown))

    def agrees(self, other: Given) -> bool:
        """Whether both kept the same tokens and gave the same numbers, by TOLERANCE."""
        return self.keeps_as(other) and self.apart(other) <= TOLERANCE


@dataclass(frozen=True)
class Tie:
    """A choice that rounding explains, and where the reference stands with the graph's choice; None
    where it cannot make it."""

    state: ImageState | DialogueState | None


def difference(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, as a share of the largest value: none is too small to be compared."""
    if found.shape != wanted.shape:
        return float("inf")
    if not wanted.numel():
        return 0.0
    scale = max(TINY, float(wanted.abs().max()))
    return float((wanted - found).abs().max()) / scale


def tie(
    stages: Stages[S],
    stage: int,
    before: S,
    after: S,
    found: Given,
    entered: tuple[Tensor, ...],  # the graph's hidden states before this stage
) -> Tie | None:
    """The tie, if rounding explains the graph's choice `found` in a stage; None if it does not. The
    reference goes through that stage from `before` to `after`.

    Rounding explains the choice if the reference makes the same one, with the same numbers, from
    the graph's own inputs or from inputs with noise. Where many choices are close, as in a greedy
    order, two roundings rarely change the same ones. Then rounding also explains a choice that
    has every token that all of these runs keep, and none that no run keeps. If tokens are only
    dropped there, the reference must also give the same numbers with just these tokens.
    """
    others = [Given.of(after, before)]
    for state in _nudged(stages, before, entered):
        turned = stages.advance(stage, state)
        others.append(Given.of(turned, before))
        if found.agrees(others[-1]):
            return Tie(turned)
    if not _is_among(found, others):
        return None
    if not stages.follows(stage):
        near = min(found.apart(other) for other in others)
        return Tie(None) if near <= max(o.apart(others[0]) for o in others[1:]) else None
    forced = stages.forced(stage, before, found.chosen[0])
    return Tie(forced) if found.agrees(Given.of(forced, before)) else None


def _is_among(found: Given, others: Sequence[Given]) -> bool:
    """Whether a choice that nobody else made is made of choices that some did."""
    if any(found.keeps_as(other) for other in others):
        return False  # the same choice, in the same order, so something else differs
    kept = [set(indices.tolist()) for other in others for indices in other.chosen]
    own = {index for indices in found.chosen for index in indices.tolist()}
    return set.intersection(*kept) <= own <= set.union(*kept)


def _nudged(stages: Stages[S], state: S, entered: tuple[Tensor, ...]) -> Iterator[S]:
    """The state with the graph's own hidden states, then with noise of 2 to 512 units in the last
    place of the largest value: rounding adds up from layer to layer."""
    if entered and entered[0].shape == state.shown[0].shape:
        yield stages.entered(state, entered[0])
    generator = torch.Generator().manual_seed(0)
    for nudge in range(NUDGES):
        yield stages.nudged(state, _noise(2 ** (1 + nudge % 9), generator))


def _noise(units: int, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    def change(values: Tensor) -> Tensor:
        noise = torch.randn(values.shape, generator=generator).to(values)
        return values + units * torch.finfo(torch.float32).eps * values.abs().max() * noise

    return change
