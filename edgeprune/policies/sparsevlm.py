"""SparseVLM: what the question's raters attend to, at three depths; what comes next is merged.

Raters are chosen once, at the decoder's input: the text tokens after the picture that get more than
the mean of softmax(H_v H_t^T) over the text. After layers 3, 7 and 16 of 32, scaled to L, visual
tokens are scored by the raters' attention, mean over raters.
Version 1.5 takes the mean over heads and recycles: of the p tokens that go, the floor(0.3 p) + 1 of
the largest scores are clustered by density peaks into floor((floor(0.3 p) + 1) / 10) + 1 means,
which follow the kept tokens.
Version 2 (SparseVLM+) recycles nothing; it divides each attention by what rotary embedding alone
makes of the distance, then takes the mean over the 14 of 32 heads with the most attention from
raters to the picture.
The counts, merged tokens included, are V, qV, q^2 V, q^3 V and q is solved for the CR.
Deviations: the paper's counts follow the rank of the attention; the released lists serve three
budgets and leave out merged tokens, so that 8 to 29 % more tokens enter the layers than they say.
Version 1.5 renumbers positions after each drop; here they stay, a merged token's being its
centre's, since one `position` serves all layers (version 2 keeps them too). The noise of 1e-6 on
densities is left out: at the authors' precision it vanishes. No attention is divided by less than
0.05 of what distance 0 makes, which LLaVA's distances do not reach.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from edgeprune.errors import SpecError
from edgeprune.policies import _policy
from edgeprune.policies._policy import Selection
from edgeprune.policies._raters import likeness, rated, raters
from edgeprune.policies._recycle import recycle
from edgeprune.policies._select import ranked
from edgeprune.policies._signals import LayerSignals
from edgeprune.policies._steps import (
    check_ranked,
    falling,
    geometric,
    parse,
    recycled,
    scaled,
    too_late,
    with_merged,
)
from edgeprune.spec import ModelShape, Plan, Stage, budget, plan_from_counts

DEPTHS = (3 / 32, 7 / 32, 16 / 32)
VERSIONS = ("1.5", "2")
FAR = 0.05


@dataclass(frozen=True)
class Policy(_policy.Policy):
    version: str = "1.5"  # 1.5, which recycles, or 2
    stages: str = "auto"  # or layers after which tokens are dropped, such as 3,7,16
    heads: int = 14  # of version 2, those that attend most from raters to the picture

    paper: ClassVar[str] = (
        "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference"
    )
    summary: ClassVar[str] = "at three depths, tokens that the question's raters attend to"
    sites: ClassVar[tuple[str, ...]] = ("layer",)
    needs: ClassVar[tuple[str, ...]] = ("text",)

    def plan(self, shape: ModelShape, cr: float, schedule: _policy.Counts | None = None) -> Plan:
        if self.version not in VERSIONS:
            raise SpecError(f"--set version= is 1.5 or 2; got {self.version!r}")
        tokens, layers = shape.visual_tokens, shape.layers
        drops = scaled(DEPTHS, layers) if self.stages == "auto" else parse(self.stages, layers)
        wanted = budget(tokens, layers, cr)
        least = sum(geometric(tokens, layers, drops, 0))
        if least > wanted:
            raise too_late("sparsevlm", drops[0], shape, least, cr)
        plan = plan_from_counts(tokens, falling(tokens, layers, drops, wanted))
        if self.version == "2":
            return plan
        check_ranked("sparsevlm", tokens)
        return with_merged(plan)

    def layer(self, signals: LayerSignals, stage: Stage, live: Stage) -> Selection:
        scores = self.record(stage.layer - 1, signals)
        spare = recycled(signals.visual_tokens, stage.keep)
        return recycle(signals.visual[0], scores, stage, live, spare)

    def record(self, layer: int, signals: LayerSignals) -> Tensor:
        """The raters' attention to each live visual token: float32 [n]."""
        inputs = signals.inputs
        weights = raters(likeness(inputs.visual[0], inputs.question()))
        attention = signals.text_attention()  # [heads, T, n]
        if self.version == "2":
            attention = attention / signals.text_nearness().clamp(min=FAR)
            mass = (attention * weights[None, :, None]).sum((1, 2))
            busy = ranked(mass, min(self.heads, attention.shape[0]))
            attention = attention.index_select(0, busy)
        return rated(attention.mean(0).T, weights)
