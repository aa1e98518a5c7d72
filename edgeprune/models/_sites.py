"""Where the decoder's graph drops visual tokens: before its first layer and between its layers."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from edgeprune.policies import Policy
from edgeprune.policies._policy import Selection
from edgeprune.policies._signals import InputSignals, LayerSignals
from edgeprune.policies._sizes import given, least
from edgeprune.spec import Stage


class Prune(nn.Module):
    """Keeps the visual tokens that a policy chooses; a module so that its nodes carry its name."""

    def __init__(self, policy: Policy, stage: Stage) -> None:
        super().__init__()
        self.policy, self.stage = policy, stage

    def forward(
        self, hidden: Tensor, positions: Tensor, signals: LayerSignals, live: Stage
    ) -> tuple[Tensor, Tensor, Selection]:
        """Hidden states and positions of the survivors, and what was chosen of the live tokens."""
        segments = signals.segments
        start, end = segments.prefix, segments.prefix + segments.visual
        chosen = self._choose(signals, live)
        slots = torch.arange(segments.total, device=hidden.device)
        survivors = torch.cat([slots[:start], chosen.indices + start, slots[end:]])
        positions = positions.index_select(1, survivors)
        if chosen.merge is None:
            return hidden.index_select(1, survivors), positions, chosen
        visual = chosen.gather(hidden[:, start:end])
        return torch.cat([hidden[:, :start], visual, hidden[:, end:]], 1), positions, chosen

    def _choose(self, signals: LayerSignals, live: Stage) -> Selection:
        if self.stage.survivors == 0:
            return Selection(signals.anchors.middle.new_empty(0))
        return self.policy.layer(signals, self.stage, live)


class PruneInput(nn.Module):
    """Keeps the visual tokens that a policy chooses by the text, before the first layer."""

    def __init__(
        self, policy: Policy, stage: Stage, encoded: int, tile_of: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.policy, self.stage, self.encoded, self.tile_of = policy, stage, encoded, tile_of

    def forward(self, visual: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """[1, V, visual width], [1, T, width] -> the survivors, and their indices among the V."""
        tokens = visual if visual.shape[2] == text.shape[2] else visual[..., : text.shape[2]]
        signals = InputSignals(tokens, self.encoded, text, self.tile_of)
        chosen = self.policy.input(signals, self.stage, live_stage(self.stage, visual.shape[1]))
        return chosen.gather(visual), chosen.indices


def live_stage(stage: Stage, entered: int, counts: Tensor | None = None) -> Stage:
    """A stage with the sizes of a call that `entered` visual tokens entered: all, or none.

    With `counts` int64 [layers] an input says how many of the tokens alive go on.
    """
    if counts is not None and stage.survivors:
        return replace(stage, keep=given(counts[stage.layer - 1 : stage.layer], entered))
    keep, merged = (least(count, entered) for count in (stage.keep, stage.merged))
    return replace(stage, keep=keep, merged=merged)
