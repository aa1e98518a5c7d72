"""Polymorphic: merging by density before the decoder, then pruning by raters inside it.

Stage 1 (Sec. 3.2, Eq. 1-7): twice the budget enters layer 1. Of that, 5.4 parts are the patches
with the most [CLS] attention (received attention where the encoder has no [CLS]), 1 part the means
of density-peak clusters of all other patches. Up to CR 2 nothing is merged here.
Stage 2 (Sec. 3.3, Eq. 9-12): after layers 3, 7 and 16 of 32, scaled to L, M = softmax over the text
of V T^T / sqrt(d), from hidden states. Text tokens with more than the mean of M are raters, a
visual token's score is its mean over the raters. The tokens that go are merged by such clusters.
The counts, merged tokens included, are N, qN, q^2 N, q^3 N with N twice the budget, and q is solved
for the CR.
`score=attention` takes the raters' attention in the layer in place of M, as SparseVLM does.

Open in the paper, chosen here; there is no released code:
- The quantiles of Eq. (12) are q.
- Of the p tokens that go, floor((floor(0.3 p) + 1) / 10) + 1 means stay, as in SparseVLM.
- The text is what follows the image.
- The nearest neighbours of Eq. (3) are as many as the clusters.
- Kept tokens come first, in reading order, then merged ones, the most prominent centre's first.
- In the decoder positions are kept; a merged token's is its centre's.
- Of several tiles (crops, images, frames) all tokens are ranked together.

Deviations from the paper:
- Eq. (4) and (8), said to be equivalent to Eq. (3) and (7), are not, and are left out.
- Eq. (5), as printed no condition at all, is read as the least distance to a denser token.
- The paper drops after layers 3, 7 and 16 of 40 too, and 3, 7 and 13 of 28: `stages=3,7,13`.
- A rater has to pass the mean by a millionth of it, so that rounding alone makes none; where no
  text token does, all rate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from edgeprune.errors import SpecError
from edgeprune.policies import _policy
from edgeprune.policies._counts import listed
from edgeprune.policies._keep_and_merge import keep_and_merge
from edgeprune.policies._policy import Selection
from edgeprune.policies._raters import rated, raters, similarity
from edgeprune.policies._schedules import (
    falling,
    geometric,
    parse,
    scaled,
    stepped,
    with_merged,
)
from edgeprune.policies._signals import LayerSignals, VisionSignals
from edgeprune.spec import AUTO, ModelShape, Plan, Stage, budget, plan_from_counts

DEPTHS = (3 / 32, 7 / 32, 16 / 32)
SCORES = ("hidden", "attention")
KEPT_TO_MERGED = 5.4


@dataclass(frozen=True)
class Policy(_policy.Policy):
    enter: float = 2.0  # tokens that enter layer 1, in budgets; 1: no stage 2
    stages: str = "auto"  # or layers after which tokens are dropped, such as 3,7,16
    counts: str = "auto"  # or the tokens that enter and those that stay after each; --cr follows
    score: str = "hidden"  # hidden states as in Eq. 9, or attention

    paper: ClassVar[str] = "Polymorphic: Plug-and-Play Visual Token Compression for Scalable VLMs"
    summary: ClassVar[str] = "[CLS] attention and density merging, then raters in the decoder"
    sites: ClassVar[tuple[str, ...]] = ("vision", "layer")
    needs: ClassVar[tuple[str, ...]] = ("text", "[CLS] above CR 2")

    def looks_at_attention(self) -> bool:
        return self.score == "attention"

    def sizes(self, shape: ModelShape, cr: float, schedule: _policy.Counts | None = None) -> Plan:
        if self.score not in SCORES:
            raise SpecError(f"--set score= is hidden or attention; got {self.score!r}")
        tokens, layers = shape.visual_tokens, shape.layers
        if not 1 <= self.enter <= layers:
            raise SpecError(f"--set enter= is a number from 1 to {layers}; got {self.enter:g}")
        drops = scaled(DEPTHS, shape) if self.stages == AUTO else parse(self.stages, shape)
        plan = plan_from_counts(tokens, self._counts(shape, drops, cr))
        return _merging_first(with_merged(plan))

    def largest_topk(self, plan: Plan) -> int:
        return plan.visual_tokens if plan.stages else 0  # those that go are in order too

    def _counts(self, shape: ModelShape, drops: tuple[int, ...], cr: float) -> tuple[int, ...]:
        """r_1 ... r_L."""
        tokens, layers = shape.visual_tokens, shape.layers
        if self.counts != AUTO:
            return stepped(listed(self.counts, 1 + len(drops), tokens), layers, drops)
        wanted = budget(tokens, layers, cr)
        first = max(1, min(tokens, round(self.enter * tokens / cr)))
        least = sum(geometric(first, layers, drops, 0))
        if least > wanted + layers:
            raise SpecError(
                f"method polymorphic lets {first} visual tokens enter the first {drops[0]} of"
                f" {layers} layers, which leaves none for the others at --cr {cr:g}; choose a"
                " smaller --set enter= or earlier --set stages="
            )
        return falling(first, layers, drops, wanted)

    def vision(self, signals: VisionSignals, stage: Stage) -> Selection:
        features = signals.features[0]
        spare = features.shape[0] - stage.keep
        return keep_and_merge(features, signals.salience(), stage, stage, spare)

    def why_frozen(self) -> str:
        return _policy.MERGES

    def layer(self, signals: LayerSignals, stage: Stage, live: Stage) -> Selection:
        scores = self.calibration_scores(stage.layer - 1, signals)
        spare = signals.visual_tokens - stage.keep
        return keep_and_merge(signals.visual[0], scores, stage, live, spare)

    def calibration_scores(self, layer: int, signals: LayerSignals) -> Tensor:
        """What the raters make of each live visual token, Eq. (11): float32 [n]."""
        visual, text = signals.visual[0], signals.text[0]
        shares = similarity(visual, text, visual.shape[1] ** -0.5)
        if self.score == "attention":
            return rated(signals.text_attention().mean(0).T, raters(shares))
        return rated(shares, raters(shares))


def _merging_first(plan: Plan) -> Plan:
    """The plan with 1 of 6.4 parts of what enters layer 1 merged, where some tokens do not."""
    if not plan.stages or plan.stages[0].site != "vision":
        return plan
    first, *rest = plan.stages
    merged = min(round(first.keep / (KEPT_TO_MERGED + 1)), first.keep - 1)
    first = replace(first, keep=first.keep - merged, merged=merged)
    return replace(plan, stages=(first, *rest))
