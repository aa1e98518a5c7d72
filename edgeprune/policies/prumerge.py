"""PruMerge: the tokens with the most [CLS] attention, each with its neighbours merged in.

[CLS] attends with all heads as one (softmax of q k^T / sqrt(width)) in the block whose output the
projector reads. Each chosen token takes in its 32 nearest by the cosine of keys, chosen or not,
weighted by their attention. They go on by falling attention; positions are renumbered.
`variant=released`: the weighted sum is added to the token, and one more token follows, the sum of
all that were not chosen by their attention; its index is that of the largest of them.
`variant=paper`: the token and its neighbours are averaged by their attention, nothing follows.

Deviations:
- The paper's count follows outliers of the attention (more than 1.5 interquartile ranges above the
  third quartile), which no static graph can; here the CR decides.
- The released code reads queries and keys of the tower's last block; here, as in the paper, they
  are those of the last but one, which is the last that is run.
- Of several tiles (crops, images, frames) all tokens are ranked together; the released code fails
  on more than one.
- Where an encoder has no [CLS], the attention that a patch receives takes its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from edgeprune.errors import SpecError
from edgeprune.policies import _policy
from edgeprune.policies._counts import ratio
from edgeprune.policies._merge import weighted_neighbours
from edgeprune.policies._policy import Selection
from edgeprune.policies._select import TAKEN, ranked, unit
from edgeprune.policies._signals import VisionSignals
from edgeprune.spec import ModelShape, Plan, Stage, merging_plan

VARIANTS = ("released", "paper")


@dataclass(frozen=True)
class Policy(_policy.Policy):
    neighbours: int = 32  # that each chosen token takes in
    variant: str = "released"  # how it does: released or paper
    counts: str = "auto"  # or the tokens that stay, such as 64; --cr follows

    paper: ClassVar[str] = (
        "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models"
    )
    summary: ClassVar[str] = "tokens with the most [CLS] attention, their neighbours merged in"
    sites: ClassVar[tuple[str, ...]] = ("vision",)

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise SpecError(f"--set variant= is released or paper; got {self.variant!r}")
        if self.neighbours < 1:
            raise SpecError(f"--set neighbours= is at least 1; got {self.neighbours}")

    def sizes(self, shape: ModelShape, cr: float, schedule: _policy.Counts | None = None) -> Plan:
        return merging_plan(shape, ratio(self.counts, shape, cr), share=1)

    def why_frozen(self) -> str:
        return _policy.MERGES

    def vision(self, signals: VisionSignals, stage: Stage) -> Selection:
        signals = signals.as_one_head()
        keys, attention, extra = signals.keys(), signals.salience(), self._extra(stage)
        chosen = self.choose(attention, stage.survivors - extra)
        at, rest = [chosen], list[Tensor]()
        if extra:
            indices = torch.arange(attention.shape[0], device=attention.device)
            taken = (chosen[:, None] == indices[None, :]).float().sum(0)
            at.append((attention - TAKEN * taken)[None].argmax(1))
            rest.append((attention * (1 - taken))[None])

        def merge(features: Tensor) -> Tensor:
            tokens = features.float()
            merged = self._merged(keys, tokens, attention, chosen)
            return torch.cat([merged, *(weights @ tokens for weights in rest)])

        return Selection(torch.cat(at), merge)

    def choose(self, attention: Tensor, count: int) -> Tensor:
        """Those with the most attention, the most first: [N] -> int64 [count]."""
        return ranked(attention, count)

    def _extra(self, stage: Stage) -> int:
        """Tokens for all that were not chosen: one, where there is room."""
        return int(self.variant == "released" and stage.survivors > 1)

    def _merged(self, keys: Tensor, tokens: Tensor, attention: Tensor, chosen: Tensor) -> Tensor:
        """[N, head], [N, width], [N], int64 [k] -> float32 [k, width]."""
        indices = torch.arange(keys.shape[0], device=keys.device)
        own = (chosen[:, None] == indices[None, :]).float()
        directions = unit(keys)
        similar = directions.index_select(0, chosen) @ directions.T - TAKEN * own
        count = min(self.neighbours, keys.shape[0] - 1)
        added, weight = weighted_neighbours(similar, tokens, attention, count)
        centres = tokens.index_select(0, chosen)
        if self.variant == "released":
            return centres + added
        share = attention.index_select(0, chosen)[:, None]
        return (share * centres + added) / (share + weight)
