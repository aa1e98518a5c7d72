"""SparseVLM: what the question's raters attend to, at three depths; what comes next is merged.

Raters are chosen once, at the decoder's input: the text tokens after the image that get more than
the mean of softmax(H_v H_t^T) over the text. After layers 3, 7 and 16 of 32, scaled to L, visual
tokens are scored by the raters' attention, mean over raters.
Version 1.5 takes the mean over heads and recycles: of the p tokens that go, the floor(0.3 p) + 1 of
the largest scores are clustered by density peaks into floor((floor(0.3 p) + 1) / 10) + 1 means,
which follow the kept tokens, the most prominent centre's first. Positions are renumbered after each
drop: in every layer a token stands where that layer's cache holds it.
Version 2 (SparseVLM+) recycles nothing and keeps positions; it divides each attention by what
rotary embedding alone makes of the distance, then takes the mean over the 14 heads with the most
attention from raters to the image, over all heads where there are fewer.
`positions` overrules either version; under M-RoPE, where the released code has no answer, positions
are kept. A merged token whose position is kept has its centre's.
The counts, merged tokens included, are V, qV, q^2 V, q^3 V and q is solved for the CR. Published
budgets of 576 tokens are `counts=309/204/113` (`@192`, CR 2.79), `312/117/39` (`@128`, CR 3.96) and
`82/32/18` (`@64`, CR 7.0) of version 1.5, `300/200/118`, `238/108/60`, `246/54/28` and `66/34/20`
of version 2.

Deviations:
- The counts of the paper and of version 1.0 follow the rank of the attention, image by image; here
  they are frozen, as in versions 1.5 and 2.
- The released lists leave out merged tokens, so that 8 to 29 % more tokens enter the layers than
  they say; `counts=` and CR count them.
- The released noise of up to 1e-6 on densities is left out: at the authors' precision it vanishes.
- Densities are float32 here; in the authors' fp16 many of them tie.
- Version 2: no attention is divided by less than 0.05 of what distance 0 makes; LLaVA's distances
  do not reach that.
- Layers 3, 7 and 16 are those of 32-layer models; of other depths the shares are the same.
- A rater has to pass the mean by a millionth of it, so that rounding alone makes none; where no
  text token does, all rate.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    merge_candidates,
    parse,
    scaled,
    stepped,
    too_late,
    with_merged,
)
from edgeprune.policies._select import ranked
from edgeprune.policies._signals import LayerSignals
from edgeprune.spec import AUTO, ModelShape, Plan, Stage, budget, plan_from_counts

DEPTHS = (3 / 32, 7 / 32, 16 / 32)
VERSIONS = ("1.5", "2")
FAR = 0.05


@dataclass(frozen=True)
class Policy(_policy.Policy):
    version: str = "1.5"  # 1.5, which recycles, or 2
    stages: str = "auto"  # or layers after which tokens are dropped, such as 3,7,16
    counts: str = "auto"  # or the tokens that stay after each, such as 309/204/113; --cr follows
    heads: int = 14  # of version 2, those that attend most from raters to the image

    paper: ClassVar[str] = (
        "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference"
    )
    summary: ClassVar[str] = "at three depths, tokens that the question's raters attend to"
    sites: ClassVar[tuple[str, ...]] = ("layer",)
    needs: ClassVar[tuple[str, ...]] = ("text",)

    def sizes(self, shape: ModelShape, cr: float, schedule: _policy.Counts | None = None) -> Plan:
        if self.version not in VERSIONS:
            raise SpecError(f"--set version= is 1.5 or 2; got {self.version!r}")
        tokens, layers = shape.visual_tokens, shape.layers
        drops = scaled(DEPTHS, shape) if self.stages == AUTO else parse(self.stages, shape)
        if self.counts != AUTO:
            levels = tokens, *listed(self.counts, len(drops), tokens)
            counts = stepped(levels, layers, drops)
        else:
            wanted, least = budget(tokens, layers, cr), sum(geometric(tokens, layers, drops, 0))
            if least > wanted:
                raise too_late("sparsevlm", drops[0], shape, least, cr)
            counts = falling(tokens, layers, drops, wanted)
        plan = plan_from_counts(tokens, counts)
        return with_merged(plan) if self.version == "1.5" else plan

    def renumbers(self, stage: Stage) -> bool:
        return self.version == "1.5"

    def largest_topk(self, plan: Plan) -> int:
        if self.version != "1.5":
            return super().largest_topk(plan)
        return plan.visual_tokens if plan.stages else 0  # those that go are in order too

    def why_frozen(self) -> str:
        return "" if self.version == "2" else f"{_policy.MERGES} (--set version=2 merges none)"

    def layer(self, signals: LayerSignals, stage: Stage, live: Stage) -> Selection:
        scores = self.calibration_scores(stage.layer - 1, signals)
        spare = merge_candidates(signals.visual_tokens, stage.keep)
        return keep_and_merge(signals.visual[0], scores, stage, live, spare)

    def calibration_scores(self, layer: int, signals: LayerSignals) -> Tensor:
        """The raters' attention to each live visual token: float32 [n]."""
        inputs = signals.inputs
        weights = raters(similarity(inputs.visual[0], inputs.question()))
        attention = signals.text_attention()  # [heads, T, n]
        if self.version == "2":
            attention = attention / signals.text_nearness().clamp(min=FAR)
            mass = (attention * weights[None, :, None]).sum((1, 2))
            busy = ranked(mass, min(self.heads, attention.shape[0]))
            attention = attention.index_select(0, busy)
        return rated(attention.mean(0).T, weights)
