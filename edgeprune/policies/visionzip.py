"""VisionZip: the tokens with the most [CLS] attention, [CLS] itself, and averages of the others.

Dominant tokens: [CLS] and those that it attends to most, in reading order. Contextual tokens: of
the remaining tokens every s-th is a target, all others join the target whose key (mean over heads)
has the largest cosine with theirs. Both in the block whose output the projector reads. Contextual
tokens come last; positions are renumbered, since tokens leave before the decoder.
`variant=released` adds the mean of those that joined to the target, as the released code does;
`variant=paper` takes the average of all, the target among them.
The shares are those of the paper's 54 + 10 tokens at every ratio.
Of several tiles (crops, images, frames) each has its share of dominant and of contextual tokens and
its own [CLS], as in the released code. `tiles=joint` ranks and merges all tokens together.

Deviations:
- Where an encoder has no [CLS], the attention that a patch receives takes its place and no such
  token goes on; nor does one where the projector reads several patches as one, which [CLS] has no
  part in, nor a second time where the model itself reads [CLS].
- The released code leaves out LLaVA-NeXT's newline tokens; here they stay and count.
- For Qwen2-VL the ports of others put a merged token where its target was; here it comes last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from edgeprune.errors import SpecError
from edgeprune.policies import _policy
from edgeprune.policies._clusters import average
from edgeprune.policies._counts import ratio
from edgeprune.policies._merge import join, split
from edgeprune.policies._policy import Merge, Selection
from edgeprune.policies._select import unit
from edgeprune.policies._signals import VisionSignals
from edgeprune.policies._tiles import (
    among_all,
    check_tiles,
    part,
    parts,
    shared,
    together,
)
from edgeprune.spec import ModelShape, Plan, Stage, merging_plan

VARIANTS = ("released", "paper")


@dataclass(frozen=True)
class Policy(_policy.Policy):
    contextual: float = 0.15625  # share of the tokens that are merged: 10 of 64
    variant: str = "released"  # how they are: released or paper
    tiles: str = "each"  # each tile has its share of the tokens; joint: they compete for all
    counts: str = "auto"  # or the tokens that stay, such as 64; --cr follows

    paper: ClassVar[str] = "VisionZip: Longer is Better but Not Necessary in Vision Language Models"
    summary: ClassVar[str] = "tokens with the most [CLS] attention, and averages of the others"
    sites: ClassVar[tuple[str, ...]] = ("vision",)

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise SpecError(f"--set variant= is released or paper; got {self.variant!r}")
        if not 0 <= self.contextual < 1:
            raise SpecError(f"--set contextual= is a share below 1; got {self.contextual:g}")

    def sizes(self, shape: ModelShape, cr: float, schedule: _policy.Counts | None = None) -> Plan:
        check_tiles(self.tiles)
        return merging_plan(shape, ratio(self.counts, shape, cr), self.contextual)

    def why_frozen(self) -> str:
        return _policy.MERGES

    def vision(self, signals: VisionSignals, stage: Stage) -> Selection:
        scores = signals.salience()
        cls, count = self._cls(signals, stage.keep), scores.shape[0]
        groups = parts(signals.tile_of, count, self.tiles)
        totals = shared(stage.survivors - cls.shape[1], [len(indices) for indices in groups])
        dominant, at = list[Tensor](), list[Tensor]()
        means = list[tuple[Tensor, Merge]]()
        for own, total, merged in zip(groups, totals, shared(stage.merged, totals), strict=True):
            best, rest = split(part(scores, own), total - merged)
            if total > merged:
                dominant.append(among_all(best, own, count))
            if merged:
                rest = among_all(rest, own, count)
                keys = signals.keys().index_select(0, rest)
                centres, mean = self._contextual(keys, merged)
                means.append((rest, mean))
                at.append(rest.index_select(0, centres))
        first = together(dominant)
        behind = torch.full((cls.shape[1],), count, device=first.device)

        def merge(features: Tensor) -> Tensor:
            merged = (mean(features.index_select(0, rest)) for rest, mean in means)
            kept = cls[0], features.index_select(0, first)
            return torch.cat([*kept, *(tokens.to(features.dtype) for tokens in merged)])

        return Selection(torch.cat([behind, first, *at]), merge)

    def _cls(self, signals: VisionSignals, keep: int) -> Tensor:
        """The [CLS] features that go on: [1, tiles, width], or none."""
        features, cls = signals.features, signals.cls
        if cls is None or signals.cls_stays or cls.shape[2] != features.shape[2]:
            return features[:, :0]
        if cls.shape[0] >= keep:
            return features[:, :0]
        return signals.cls_features()

    def _contextual(self, keys: Tensor, merged: int) -> tuple[Tensor, Merge]:
        """[n, head] -> targets int64 [merged], and what makes merged tokens float32 [merged, width]
        of n.

        The targets are every s-th of the n, s = n // merged, from the first on.
        """
        chosen = torch.arange(merged, device=keys.device) * (keys.shape[0] // merged)
        similar = unit(keys.index_select(0, chosen)) @ unit(keys).T
        indices = torch.arange(keys.shape[0], device=keys.device)
        own = (chosen[:, None] == indices[None, :]).float()
        taken = own.sum(0)
        members = join(similar) * (1 - taken)

        def mean(tokens: Tensor) -> Tensor:
            if self.variant == "paper":
                return average(members + own, tokens)
            return tokens.float().index_select(0, chosen) + average(members, tokens)

        return chosen, mean
