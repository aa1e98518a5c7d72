"""VisionZip: the tokens with the most [CLS] attention, [CLS] itself, and averages of the others.

Dominant tokens: [CLS] and those that it attends to most, in reading order. Contextual tokens: of
the remaining tokens every s-th is a target, all others join the target whose key (mean over heads)
has the largest cosine with theirs. Both in the block whose output the projector reads. Contextual
tokens come last; positions are renumbered, since tokens leave before the decoder.
`variant=released` adds the mean of those that joined to the target, as the released code does;
`variant=paper` takes the average of all, the target among them.
The shares are those of the paper's 54 + 10 tokens at every ratio.
Deviations: where an encoder has no [CLS], the attention that a patch receives takes its place and
no such token goes on; nor does one where the projector reads several patches as one, which [CLS]
has no part in, nor a second time where the model itself reads [CLS]. Of a picture in tiles every
tile's [CLS] goes on.
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
from edgeprune.policies._merge import join, others
from edgeprune.policies._policy import Selection
from edgeprune.policies._select import top, unit
from edgeprune.policies._signals import VisionSignals
from edgeprune.spec import ModelShape, Plan, Stage, merging_plan

VARIANTS = ("released", "paper")


@dataclass(frozen=True)
class Policy(_policy.Policy):
    contextual: float = 0.15625  # share of the tokens that are merged: 10 of 64
    variant: str = "released"  # how they are: released or paper
    counts: str = "auto"  # or the tokens that stay, such as 64; --cr follows

    paper: ClassVar[str] = "VisionZip: Longer is Better but Not Necessary in Vision Language Models"
    summary: ClassVar[str] = "tokens with the most [CLS] attention, and averages of the others"
    sites: ClassVar[tuple[str, ...]] = ("vision",)

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise SpecError(f"--set variant= is released or paper; got {self.variant!r}")
        if not 0 <= self.contextual < 1:
            raise SpecError(f"--set contextual= is a share below 1; got {self.contextual:g}")

    def plan(self, shape: ModelShape, cr: float, schedule: _policy.Counts | None = None) -> Plan:
        return merging_plan(shape, ratio(self.counts, shape, cr), self.contextual)

    def vision(self, signals: VisionSignals, stage: Stage) -> Selection:
        features, count = signals.features, signals.features.shape[1]
        cls = self._cls(signals, stage.keep)
        best = top(signals.salience(), stage.keep - cls.shape[1])
        places = torch.full((cls.shape[1],), count, device=best.device)
        parts, at = [cls, features.index_select(1, best)], [places, best]
        if stage.merged:
            rest = others(best, count)
            tokens, centres = self._contextual(
                features[0].index_select(0, rest), signals.keys().index_select(0, rest), stage
            )
            parts.append(tokens[None].to(features.dtype))
            at.append(rest.index_select(0, centres))
        return Selection(torch.cat(at), torch.cat(parts, dim=1))

    def _cls(self, signals: VisionSignals, keep: int) -> Tensor:
        """The [CLS] features that go on: [1, tiles, width], or none."""
        features, cls = signals.features, signals.cls
        if cls is None or signals.cls_stays or cls.shape[2] != features.shape[2]:
            return features[:, :0]
        if cls.shape[0] >= keep:
            return features[:, :0]
        return signals.cls_features()

    def _contextual(self, tokens: Tensor, keys: Tensor, stage: Stage) -> tuple[Tensor, Tensor]:
        """[n, width], [n, head] -> merged tokens float32 [merged, width], targets int64 [merged].

        The targets are every s-th of the n, s = n // merged, from the first on.
        """
        step = tokens.shape[0] // stage.merged
        chosen = torch.arange(stage.merged, device=tokens.device) * step
        similar = unit(keys.index_select(0, chosen)) @ unit(keys).T
        places = torch.arange(tokens.shape[0], device=tokens.device)
        own = (chosen[:, None] == places[None, :]).float()
        taken = own.sum(0)
        members = join(similar) * (1 - taken)
        if self.variant == "paper":
            return average(members + own, tokens), chosen
        return tokens.float().index_select(0, chosen) + average(members, tokens), chosen
