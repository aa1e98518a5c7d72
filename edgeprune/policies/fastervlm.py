"""FasterVLM: the tokens that the encoder's own [CLS] looks at most.

The score is the attention of [CLS] to each patch, head mean, in the block whose output the
projector reads (the released code's attentions[-2]). The survivors keep reading order, [CLS] itself
does not go on, and positions are renumbered, since tokens leave before the decoder.
Of several tiles (crops, images, frames) each has its share of the tokens, as in the released code,
which takes T of each crop. `tiles=joint` ranks all tokens together: a dull tile may lose them all.

Deviations:
- Where an encoder has no [CLS], the attention that a patch receives takes its place.
- The released code leaves out LLaVA-NeXT's newline tokens and keeps padding; here padding is left
  out, newlines stay and count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edgeprune.policies import _policy
from edgeprune.policies._counts import ratio
from edgeprune.policies._policy import Selection
from edgeprune.policies._select import top
from edgeprune.policies._signals import VisionSignals
from edgeprune.policies._tiles import check_tiles, of_each, part, parts
from edgeprune.spec import ModelShape, Plan, Stage, flat_plan


@dataclass(frozen=True)
class Policy(_policy.Policy):
    tiles: str = "each"  # each tile has its share of the tokens; joint: they compete for all
    counts: str = "auto"  # or the tokens that stay, such as 64; --cr follows

    paper: ClassVar[str] = (
        "[CLS] Attention is All You Need for Training-Free Visual Token Pruning:"
        " Make VLM Inference Faster"
    )
    summary: ClassVar[str] = "tokens with the most [CLS] attention, before the decoder"
    sites: ClassVar[tuple[str, ...]] = ("vision",)
    needs: ClassVar[tuple[str, ...]] = ("[CLS]",)

    def sizes(self, shape: ModelShape, cr: float, schedule: _policy.Counts | None = None) -> Plan:
        check_tiles(self.tiles)
        return flat_plan(shape.visual_tokens, shape.layers, ratio(self.counts, shape, cr))

    def why_frozen(self) -> str:
        return (
            "" if self.tiles == "joint" else "each tile has a fixed share (--set tiles=joint: none)"
        )

    def vision(self, signals: VisionSignals, stage: Stage) -> Selection:
        scores = signals.salience()
        groups = parts(signals.tile_of, scores.shape[0], self.tiles)
        return Selection(of_each(groups, stage.keep, lambda own, n: top(part(scores, own), n)))
