"""CDPruner: tokens that matter to the question and are unlike each other, by a determinant.

The kernel is L_ij = r_i cos(x_i, x_j) r_j over the projected tokens, where r_i is how relevant
token i is, scaled to 0 .. 1 over all tokens; greedy MAP inference of the determinantal point
process takes, token by token, what enlarges the determinant of the chosen rows by most. Survivors
keep reading order and positions are renumbered. It runs in the decoder's graph, before layer 1; a
decode step passes its greedy steps with nothing to choose from.
Of several tiles (crops, images, frames) each has its share of the tokens and its own determinant,
as in the released code; r_i is scaled over all of them. `tiles=joint` takes one determinant of all.

Deviations:
- The released code takes r_i from CLIP's text tower, negated, since patches that CLIP's cosine puts
  near a text show it least. No checkpoint supported here holds that tower, so r_i is the mean
  cosine to the embeddings of the text after the image, in the decoder's input space, not negated.
- A chosen token is never chosen again, and where the chosen ones span all others, up to 1% of their
  length, those follow by r_i; the released code repeats tokens there.
- The released code leaves out LLaVA-NeXT's newline tokens and keeps padding; here padding is left
  out. A newline, or text between images, counts to the tile before it and may be pruned like it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from edgeprune.policies import _policy
from edgeprune.policies._counts import ratio
from edgeprune.policies._diverse import determinant
from edgeprune.policies._policy import Selection
from edgeprune.policies._relevance import relevance
from edgeprune.policies._select import unit
from edgeprune.policies._signals import InputSignals
from edgeprune.policies._sizes import least
from edgeprune.policies._tiles import check_tiles, parts, shared, together
from edgeprune.spec import ModelShape, Plan, Stage, flat_plan


@dataclass(frozen=True)
class Policy(_policy.Policy):
    tiles: str = "each"  # each tile has its share of the tokens; joint: they compete for all
    counts: str = "auto"  # or the tokens that stay, such as 64; --cr follows

    paper: ClassVar[str] = (
        "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in"
        " MLLMs"
    )
    summary: ClassVar[str] = "tokens near the question and unlike each other, by a determinant"
    sites: ClassVar[tuple[str, ...]] = ("input",)
    needs: ClassVar[tuple[str, ...]] = ("text",)
    stands_in: ClassVar[str] = "the decoder's text embeddings in place of CLIP's text tower"

    def sizes(self, shape: ModelShape, cr: float, schedule: _policy.Counts | None = None) -> Plan:
        check_tiles(self.tiles)
        cr = ratio(self.counts, shape, cr)
        return flat_plan(shape.visual_tokens, shape.layers, cr, "input", text=True)

    def why_frozen(self) -> str:
        return _policy.ONE_BY_ONE

    def input(self, signals: InputSignals, stage: Stage, live: Stage) -> Selection:
        directions = unit(signals.visual[0])
        quality = relevance(directions, unit(signals.question()))
        vectors, count = directions * quality[:, None], directions.shape[0]
        groups = parts(signals.tile_of, signals.visual_tokens, self.tiles)
        if len(groups) == 1:
            return Selection(determinant(vectors, stage.keep, live.keep))
        chosen = list[Tensor]()
        for indices, keep in zip(groups, shared(stage.keep, list(map(len, groups))), strict=True):
            if keep:
                own = torch.tensor(indices, device=vectors.device)
                own = own.narrow(0, 0, least(len(indices), count))  # none in a decode step
                best = determinant(vectors.index_select(0, own), keep, least(keep, count))
                chosen.append(own.index_select(0, best))
        return Selection(together(chosen))
