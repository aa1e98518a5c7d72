"""TrimTokenator: first the tokens nearest to the question, of those the most unlike each other.

Alignment (Sec. 4.2, Eq. 3-4): the N1 = floor(0.8 V) tokens with the largest alpha_i, the negative
mean Euclidean distance to the text's embeddings. Diversity (Sec. 4.3, Eq. 8-16): Greedy RepMax, the
token of least mean cosine to all, then again and again that of least mean cosine to those chosen.
Both in the decoder's input space, so it runs in the decoder graph, before layer 1; a decode step
passes its greedy steps with nothing to choose from.

Open in the paper, chosen here; there is no released code:
- The text is what follows the image, the template's end included.
- Distances are those of Eq. 3; Appendix B derives with their squares, which order otherwise.
- Survivors keep reading order and positions are renumbered.
- Where more tokens stay than alignment would leave, alignment alone chooses.
- Of several tiles (crops, images, frames) all tokens are one pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from edgeprune.errors import SpecError
from edgeprune.policies import _policy
from edgeprune.policies._counts import ratio
from edgeprune.policies._policy import Selection
from edgeprune.policies._select import min_sum, top
from edgeprune.policies._signals import InputSignals
from edgeprune.spec import ModelShape, Plan, Stage, flat_plan


@dataclass(frozen=True)
class Policy(_policy.Policy):
    aligned: float = 0.8  # share of the tokens that alignment leaves
    counts: str = "auto"  # or the tokens that stay, such as 64; --cr follows

    paper: ClassVar[str] = (
        "TrimTokenator: Towards Adaptive Visual Token Pruning for Large Multimodal Models"
    )
    summary: ClassVar[str] = "tokens near the question's embeddings, then the most unlike ones"
    sites: ClassVar[tuple[str, ...]] = ("input",)
    needs: ClassVar[tuple[str, ...]] = ("text",)

    def sizes(self, shape: ModelShape, cr: float, schedule: _policy.Counts | None = None) -> Plan:
        if not 0 < self.aligned <= 1:
            raise SpecError(f"--set aligned= is a share above 0, at most 1; got {self.aligned:g}")
        cr = ratio(self.counts, shape, cr)
        return flat_plan(shape.visual_tokens, shape.layers, cr, "input", text=True)

    def why_frozen(self) -> str:
        return _policy.ONE_BY_ONE

    def input(self, signals: InputSignals, stage: Stage, live: Stage) -> Selection:
        alignment = signals.alignment()
        if stage.keep >= (shortlist := int(self.aligned * signals.visual_tokens)):
            return Selection(top(alignment, live.keep))
        nearest = torch.sym_min(shortlist, alignment.shape[0])  # type: ignore[no-untyped-call]
        near = top(alignment, nearest)
        chosen = min_sum(signals.visual[0].index_select(0, near), stage.keep, live.keep)
        return Selection(near.index_select(0, chosen))
