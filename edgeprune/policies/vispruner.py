"""VisPruner: half by the encoder's attention, half by being unlike each other.

The score is the attention of [CLS] to each patch, head mean, in the block whose output the
projector reads; the floor(T / 2) patches with most of it stay. The others, most attended first,
lose repeats in passes: of the patches with even indices in the list, the 8 whose features are most
alike (cosine) to one with an odd index go, until T are left in all. Those that stay precede
the odd ones, the most alike first, which pairs them anew. Survivors keep reading order and
positions are renumbered, since tokens leave before the decoder.
Of several tiles (crops, images, frames) each has its share of the tokens, as in the released code,
which takes T of each crop. `tiles=joint` ranks and pairs all tokens together.

A pass pairs what the last one left, so one close choice that turns changes the pairs of all later
passes. Cosines are float32 in every dtype; in float16 the features and the order of attention are
rounded, and about 80% of float32's tokens stay (4 of 5 at CR 4 on the demo).

Deviations:
- The released code fails where a list has an odd length or a pass would drop more than there are at
  even indices; here the even ones may be one more, and all of them may go.
- Where an encoder has no [CLS], the attention that a patch receives takes its place.
- LLaVA-NeXT's newline tokens stay, whatever is pruned, and count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from edgeprune.errors import SpecError
from edgeprune.policies import _policy
from edgeprune.policies._counts import ratio
from edgeprune.policies._diverse import without_pairs
from edgeprune.policies._policy import Selection
from edgeprune.policies._select import ascending, ranked
from edgeprune.policies._signals import VisionSignals
from edgeprune.policies._tiles import check_tiles, of_each, part, parts
from edgeprune.spec import ModelShape, Plan, Stage, flat_plan


@dataclass(frozen=True)
class Policy(_policy.Policy):
    important: float = 0.5  # share of the tokens that stay for their attention
    tiles: str = "each"  # each tile has its share of the tokens; joint: they compete for all
    counts: str = "auto"  # or the tokens that stay, such as 64; --cr follows

    paper: ClassVar[str] = (
        "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs"
    )
    summary: ClassVar[str] = "half by [CLS] attention, half by being unlike each other"
    sites: ClassVar[tuple[str, ...]] = ("vision",)
    needs: ClassVar[tuple[str, ...]] = ("[CLS]",)

    def sizes(self, shape: ModelShape, cr: float, schedule: _policy.Counts | None = None) -> Plan:
        if not 0 <= self.important <= 1:
            raise SpecError(f"--set important= is a share from 0 to 1; got {self.important:g}")
        check_tiles(self.tiles)
        return flat_plan(shape.visual_tokens, shape.layers, ratio(self.counts, shape, cr))

    def largest_topk(self, plan: Plan) -> int:
        return plan.visual_tokens if plan.stages else 0  # those that go are in order too

    def why_frozen(self) -> str:
        return _policy.ONE_BY_ONE

    def vision(self, signals: VisionSignals, stage: Stage) -> Selection:
        features, scores = signals.features[0], signals.salience()
        groups = parts(signals.tile_of, scores.shape[0], self.tiles)

        def choose(own: Sequence[int], keep: int) -> Tensor:
            return self._chosen(part(features, own), part(scores, own), keep)

        return Selection(of_each(groups, stage.keep, choose))

    def _chosen(self, features: Tensor, scores: Tensor, keep: int) -> Tensor:
        """Of the tokens of one tile: [n, width], [n] -> int64 [keep], rising."""
        order, important = ranked(scores, scores.shape[0]), int(self.important * keep)
        kept, rest = order[:important], order[important:]
        if important < keep:
            kept = torch.cat([kept, without_pairs(features, rest, keep - important)])
        return ascending(kept)
