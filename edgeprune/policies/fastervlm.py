"""FasterVLM: the tokens that the encoder's own [CLS] looks at most.

The score is the attention of [CLS] to each patch, head mean, in the block whose output the
projector reads (the released code's attentions[-2]). The survivors keep reading order, [CLS] itself
does not go on, and positions are renumbered, since tokens leave before the decoder.
Where an encoder has no [CLS], the attention that a patch receives from the others takes its place.
No other deviation from the released code is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edgeprune.policies import _policy
from edgeprune.policies._counts import ratio
from edgeprune.policies._policy import Selection
from edgeprune.policies._select import top
from edgeprune.policies._signals import VisionSignals
from edgeprune.spec import ModelShape, Plan, Stage, flat_plan


@dataclass(frozen=True)
class Policy(_policy.Policy):
    counts: str = "auto"  # or the tokens that stay, such as 64; --cr follows

    paper: ClassVar[str] = (
        "[CLS] Attention is All You Need for Training-Free Visual Token Pruning:"
        " Make VLM Inference Faster"
    )
    summary: ClassVar[str] = "tokens with the most [CLS] attention, before the decoder"
    sites: ClassVar[tuple[str, ...]] = ("vision",)
    needs: ClassVar[tuple[str, ...]] = ("[CLS]",)

    def plan(self, shape: ModelShape, cr: float, schedule: _policy.Counts | None = None) -> Plan:
        return flat_plan(shape.visual_tokens, shape.layers, ratio(self.counts, shape, cr))

    def vision(self, signals: VisionSignals, stage: Stage) -> Selection:
        return Selection(top(signals.salience(), stage.keep))
