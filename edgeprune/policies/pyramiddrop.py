"""PyramidDrop: at three depths, a share q of the tokens with the last token's attention stays.

The score is the last prompt token's attention, head mean, in the layer before the drop.
The counts are V, qV, q^2 V, q^3 V and q is solved for the CR. Up to the CR of the paper's q = 1/2
(32/15) the drops follow layers L/4, L/2, 3L/4 as in the paper; above it they follow L/16, L/4, L/2,
the author's choice for smaller budgets (issue 29 of the released code). Published for 576 tokens:
`counts=288/144/72`, CR 2.13, and with `stages=2,8,16` 322/180/100, 241/101/42 and 110/21/4.
After a drop positions are renumbered, as in the released code: in every layer a token stands where
that layer's cache holds it. `positions=keep` leaves each token its first position. Under M-RoPE,
where the released code has no answer, positions are kept.

Deviations:
- The released code scores with queries and keys that the next layer makes of this layer's output;
  here, as in the paper, they are those of the layer before the drop.
- The released code rounds each count down; here counts are rounded so that their sum is the CR's.
- The published layers are those of 32-layer models; of other depths the shares are the same.
- The paper also trains with these drops; here the checkpoint is as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edgeprune.policies import _policy
from edgeprune.policies._counts import listed
from edgeprune.policies._policy import Selection
from edgeprune.policies._schedules import (
    falling,
    geometric,
    parse,
    scaled,
    stepped,
    too_late,
)
from edgeprune.policies._select import top
from edgeprune.policies._signals import LayerSignals
from edgeprune.spec import AUTO, ModelShape, Plan, Stage, budget, plan_from_counts

PAPER = (1 / 4, 1 / 2, 3 / 4)
LATER = (1 / 16, 1 / 4, 1 / 2)


@dataclass(frozen=True)
class Policy(_policy.Policy):
    stages: str = "auto"  # or layers after which tokens are dropped, such as 8,16,24
    counts: str = "auto"  # or the tokens that stay after each, such as 288/144/72; --cr follows

    paper: ClassVar[str] = (
        "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy"
        " Reduction"
    )
    summary: ClassVar[str] = (
        "at three depths, a share of the tokens by the last prompt token's attention"
    )
    sites: ClassVar[tuple[str, ...]] = ("layer",)
    needs: ClassVar[tuple[str, ...]] = ("text",)

    def sizes(self, shape: ModelShape, cr: float, schedule: _policy.Counts | None = None) -> Plan:
        tokens, layers = shape.visual_tokens, shape.layers
        return plan_from_counts(tokens, self._counts(shape, budget(tokens, layers, cr), cr))

    def renumbers(self, stage: Stage) -> bool:
        return True

    def why_frozen(self) -> str:
        return ""

    def layer(self, signals: LayerSignals, stage: Stage, live: Stage) -> Selection:
        return Selection(top(signals.last_query_attention(), live.keep))

    def _counts(self, shape: ModelShape, wanted: int, cr: float) -> tuple[int, ...]:
        """r_1 ... r_L."""
        tokens, layers = shape.visual_tokens, shape.layers
        if self.counts != AUTO:
            drops = scaled(PAPER, shape) if self.stages == AUTO else parse(self.stages, shape)
            levels = tokens, *listed(self.counts, len(drops), tokens)
            return stepped(levels, layers, drops)
        drops = self._drops(shape, wanted)
        least = sum(geometric(tokens, layers, drops, 0))
        if least > wanted:
            raise too_late("pyramiddrop", drops[0], shape, least, cr)
        return falling(tokens, layers, drops, wanted)

    def _drops(self, shape: ModelShape, wanted: int) -> tuple[int, ...]:
        """Layers after which tokens are dropped, rising, of 1 .. L - 1."""
        if self.stages != AUTO:
            return parse(self.stages, shape)
        drops = scaled(PAPER, shape)
        half = sum(geometric(shape.visual_tokens, shape.layers, drops, 0.5))
        return drops if half <= wanted else scaled(LATER, shape)
