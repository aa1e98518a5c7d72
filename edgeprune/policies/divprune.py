"""DivPrune: the tokens that lie furthest apart, whatever the question is.

Max-min diversity of the projected tokens with distance 1 - cosine: the first token is the one whose
nearest neighbour is furthest, each next one that whose nearest chosen token is furthest. Survivors
keep reading order; positions are renumbered, since tokens leave before the decoder. It runs in the
vision graph, after the projector. All crops are one pool, newline tokens too, as in the released
code.

Deviation:
- A chosen token is never chosen again; the released code repeats tokens once no direction is new.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edgeprune.policies import _policy
from edgeprune.policies._counts import ratio
from edgeprune.policies._policy import Selection
from edgeprune.policies._select import max_min
from edgeprune.policies._signals import InputSignals
from edgeprune.spec import ModelShape, Plan, Stage, flat_plan


@dataclass(frozen=True)
class Policy(_policy.Policy):
    counts: str = "auto"  # or the tokens that stay, such as 64; --cr follows

    paper: ClassVar[str] = (
        "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models"
    )
    summary: ClassVar[str] = "tokens furthest apart in the decoder's space"
    sites: ClassVar[tuple[str, ...]] = ("input",)

    def sizes(self, shape: ModelShape, cr: float, schedule: _policy.Counts | None = None) -> Plan:
        cr = ratio(self.counts, shape, cr)
        return flat_plan(shape.visual_tokens, shape.layers, cr, "input")

    def why_frozen(self) -> str:
        return _policy.ONE_BY_ONE

    def input(self, signals: InputSignals, stage: Stage, live: Stage) -> Selection:
        return Selection(max_min(signals.visual[0], live.keep))
