"""VisPruner: half by the encoder's attention, half by being unlike each other.

The score is the attention of [CLS] to each patch, head mean, in the block whose output the
projector reads; the floor(T / 2) patches with most of it stay. The others, most attended first,
lose repeats in passes: of the patches at even places in the list, the 8 whose features are most
alike (cosine) to one at an odd place go, until T are left in all. Those that stay move in front of
the odd ones, the most alike first, which pairs them anew. Survivors keep reading order and
positions are renumbered, since tokens leave before the decoder.
Deviations: the released code fails where a list has an odd length or a pass would drop more than
there are at even places; here the even ones may be one more, and all of them may go. Where an
encoder has no [CLS], the attention that a patch receives from the others takes its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from edgeprune.errors import SpecError
from edgeprune.policies import _policy
from edgeprune.policies._counts import ratio
from edgeprune.policies._diverse import without_pairs
from edgeprune.policies._policy import Selection
from edgeprune.policies._select import ascending, ranked
from edgeprune.policies._signals import VisionSignals
from edgeprune.policies._steps import check_ranked
from edgeprune.spec import ModelShape, Plan, Stage, flat_plan


@dataclass(frozen=True)
class Policy(_policy.Policy):
    important: float = 0.5  # share of the tokens that stay for their attention
    counts: str = "auto"  # or the tokens that stay, such as 64; --cr follows

    paper: ClassVar[str] = (
        "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs"
    )
    summary: ClassVar[str] = "half by [CLS] attention, half by being unlike each other"
    sites: ClassVar[tuple[str, ...]] = ("vision",)
    needs: ClassVar[tuple[str, ...]] = ("[CLS]",)

    def plan(self, shape: ModelShape, cr: float, schedule: _policy.Counts | None = None) -> Plan:
        if not 0 <= self.important <= 1:
            raise SpecError(f"--set important= is a share from 0 to 1; got {self.important:g}")
        plan = flat_plan(shape.visual_tokens, shape.layers, ratio(self.counts, shape, cr))
        if plan.stages:
            check_ranked("vispruner", shape.visual_tokens)
        return plan

    def vision(self, signals: VisionSignals, stage: Stage) -> Selection:
        features = signals.features[0]
        order = ranked(signals.salience(), features.shape[0])
        important = int(self.important * stage.keep)
        kept, rest = order[:important], order[important:]
        if important < stage.keep:
            others = without_pairs(features, rest, stage.keep - important)
            kept = torch.cat([kept, others])
        return Selection(ascending(kept))
