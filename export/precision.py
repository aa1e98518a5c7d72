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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from edgeprune.bundle import DistanceRecord
from edgeprune.errors import ParityError
from edgeprune.export.dialogue import REPORT, Graphs, Outcome, play, require_finite
from edgeprune.models._processor import Prompt
from edgeprune.models._reference import Reference
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
    graphs: Graphs | None,
    reference: Reference,
    half: Reference,
    prompts: Sequence[Prompt],
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[DistanceRecord, DistanceRecord | None]:
    """Distances to the float32 `reference` of the eager model `half` and of its graphs.

    The latter is None without graphs: RUNS lists what ONNX Runtime has kernels for. ParityError
    where a number is not finite, or a distance above its limit.
    """
    plan, eager, graph = reference.decoder.plan, Tally(), Tally()
    engines: list[tuple[Tally, Reference | Graphs, str]] = [(eager, half, "the eager model")]
    engines += [(graph, graphs, "the exported graph")] if graphs else []
    for number, prompt in enumerate(prompts, 1):
        wanted, token = play(reference, prompt)
        require_finite(wanted, "the float32 model", number, "check the checkpoint's weights")
        for tally, engine, name in engines:
            found, _ = play(engine, prompt, token)
            require_finite(found, f"{name} in {_name(half)}", number, _advice(half))
            tally.add(found, wanted, plan)
        progress(number)
    _require_near(eager, half)
    if graphs is None:
        return eager.record(), None
    require_no_farther(graph, eager, _name(half))
    return eager.record(), graph.record()


def _name(half: Reference) -> str:
    return NAMES[half.dtype]


def _advice(half: Reference) -> str:
    return f"export with {WIDER[half.dtype]}"


def _distance(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference, in standard deviations of `wanted`."""
    return float((found - wanted).square().mean().sqrt() / wanted.std().clamp(min=1e-30))


def _require_near(eager: Tally, half: Reference) -> None:
    """ParityError where rounding makes another model of it."""
    found = eager.record()
    if not (found.logits <= LOGITS_LIMIT and found.tokens >= TOKENS_LIMIT):
        raise ParityError(
            f"{_name(half)} does not hold this model: the eager model's logits are"
            f" {found.logits:.2g} standard deviations from float32's (at most {LOGITS_LIMIT:g} is"
            f" right), {found.tokens:.0%} of the next tokens are equal (at least"
            f" {TOKENS_LIMIT:.0%}); nothing was written: {_advice(half)}"
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
