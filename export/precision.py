"""Half precision against float32: measured, judged and reported.

Rounding turns close choices, so a model in half precision keeps other tokens than the float32 one
now and then, and equal sets cannot be demanded of it. What can be demanded is this:

- every number is finite;
- the eager model in half precision is still the float32 model, within fixed limits;
- the exported graph, where ONNX Runtime has kernels for it, is no farther from the float32 model
  than the eager one, but for a margin.

That graph and eager model are the same program is shown apart, in float32 (parity.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from edgeprune.errors import ParityError
from edgeprune.export.dialogue import REPORT
from edgeprune.measured import DistanceRecord
from edgeprune.models._dialogues import Outcome
from edgeprune.models._rounding import NAMES, WIDER
from edgeprune.spec import Plan

LOGITS_LIMIT = 0.25
"""Of the eager model's logits: their median distance from float32, in standard deviations of the
float32 logits. Unrelated logits are at 1.4; fp16 was seen at 0.001 to 0.05, bf16 at 0.01 to 0.1."""

TOKENS_LIMIT = 0.5
"""Least share of next tokens that the eager model has in common with float32."""

CHOICES = 2, 0.1
"""The graph may differ from float32 in this many more choices than the eager model, and in this
share of all more: two roundings turn different ones of the close choices."""

LOGITS_MARGIN = 2, 0.01
"""The graph's logits may be this many times as far from float32 as the eager model's, and this
farther."""


RUNS = (torch.float16,)
"""ONNX Runtime's CPU provider has no kernels for bf16."""


@dataclass
class Tally:
    """Compares one model with the float32 one, sample by sample."""

    sites: dict[str, list[int]] = field(default_factory=dict)  # kept by both, kept by float32
    distances: list[float] = field(default_factory=list)  # of each call's logits
    equal: int = 0  # next tokens

    @classmethod
    def of(cls, found: Sequence[Outcome], wanted: Sequence[Outcome], plan: Plan) -> Tally:
        """What one model made of samples beside what the float32 one did."""
        tally = cls()
        for one, other in zip(found, wanted, strict=True):
            tally.add(one, other, plan)
        return tally

    def add(self, found: Outcome, wanted: Outcome, plan: Plan) -> None:
        """Count one sample."""
        names = ("vision", *(f"kept.{stage.layer}" for stage in plan.in_decoder))
        sites = zip(names, found.survivors(), wanted.survivors(), strict=True)
        for name, ours, theirs in sites:
            if len(theirs) < plan.visual_tokens:
                common, kept = self.sites.get(name, [0, 0])
                self.sites[name] = [common + len(ours & theirs), kept + len(theirs)]
        for logits, float32 in zip(found.logits, wanted.logits, strict=True):
            self.distances.append(_distance(logits, float32))
            self.equal += int(logits.argmax() == float32.argmax())

    def record(self) -> DistanceRecord:
        shares = {name: c / kept if kept else 1.0 for name, (c, kept) in self.sites.items()}
        return DistanceRecord(shares, median(self.distances), self.equal / len(self.distances))


def measure(
    plan: Plan,
    dtype: torch.dtype,
    exact: Sequence[Outcome],
    half: Sequence[Outcome],
    graph: Sequence[Outcome] | None,
) -> tuple[DistanceRecord, DistanceRecord | None]:
    """Distances to the float32 model of the eager model in a half-precision `dtype` and of its
    graph, by what each made of the same samples.

    The latter is None without a graph: RUNS lists what ONNX Runtime has kernels for. ParityError
    where a number is not finite, or a distance above its limit.
    """
    name, advice = NAMES[dtype], f"export with {WIDER[dtype]}"
    require_all_finite(exact, "the float32 model", "check the checkpoint's weights")
    require_all_finite(half, f"the eager model in {name}", advice)
    eager = Tally.of(half, exact, plan)
    _require_near(eager, name, advice)
    if graph is None:
        return eager.record(), None
    require_all_finite(graph, f"the exported graph in {name}", advice)
    tally = Tally.of(graph, exact, plan)
    require_no_farther(tally, eager, name)
    return eager.record(), tally.record()


def require_all_finite(outcomes: Sequence[Outcome], name: str, advice: str) -> None:
    """ParityError that names the first infinity or NaN of what an engine made of samples."""
    for number, outcome in enumerate(outcomes, 1):
        if where := outcome.not_finite():
            raise ParityError(
                f"{name} gives {where} that are not finite on sample {number}; nothing was written:"
                f" {advice}"
            )


def _distance(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference, in standard deviations of `wanted`."""
    return float((found - wanted).square().mean().sqrt() / wanted.std().clamp(min=1e-30))


def _require_near(eager: Tally, name: str, advice: str) -> None:
    """ParityError where rounding makes another model of it."""
    found = eager.record()
    if not (found.logits <= LOGITS_LIMIT and found.tokens >= TOKENS_LIMIT):
        raise ParityError(
            f"{name} does not hold this model: the eager model's logits are"
            f" {found.logits:.2g} standard deviations from float32's (at most {LOGITS_LIMIT:g} is"
            f" right), {found.tokens:.0%} of the next tokens are equal (at least"
            f" {TOKENS_LIMIT:.0%}); nothing was written: {advice}"
        )


def require_no_farther(graph: Tally, eager: Tally, numbers: str) -> None:
    """ParityError where the graph is farther from float32 than the eager model and the margin."""
    ours, theirs = graph.record(), eager.record()
    worse = [
        f"keeps {ours.overlap[name]:.1%} of float32's tokens at {name}, the eager model"
        f" {theirs.overlap[name]:.1%}"
        for name, (common, kept) in eager.sites.items()
        if _many_more(kept - graph.sites[name][0], kept - common, kept)
    ]
    times, more = LOGITS_MARGIN
    if not ours.logits <= times * theirs.logits + more:
        worse.append(
            f"has logits {ours.logits:.2g} standard deviations from float32's, the eager model"
            f" {theirs.logits:.2g}"
        )
    calls = len(eager.distances)
    if _many_more(calls - graph.equal, calls - eager.equal, calls):
        worse.append(
            f"has {ours.tokens:.0%} of float32's next tokens, the eager model {theirs.tokens:.0%}"
        )
    if worse:
        raise ParityError(
            f"the exported graph is farther from float32 than the eager model in {numbers}: it"
            f" {'; it '.join(worse)}; nothing was written. {REPORT}"
        )


def _many_more(graph: int, eager: int, choices: int) -> bool:
    """Whether so many other choices of the graph are more than the eager model's and a margin."""
    few, share = CHOICES
    return graph > eager + few + share * choices
