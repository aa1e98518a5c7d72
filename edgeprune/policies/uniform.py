"""Control: tokens spread evenly over the image, the same for every image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from edgeprune.policies import _policy
from edgeprune.policies._counts import ratio
from edgeprune.policies._policy import Selection
from edgeprune.policies._select import lattice
from edgeprune.policies._signals import VisionSignals
from edgeprune.spec import ModelShape, Plan, Stage, flat_plan


@dataclass(frozen=True)
class Policy(_policy.Policy):
    counts: str = "auto"  # or the tokens that stay, such as 64; --cr follows

    summary: ClassVar[str] = "control: tokens spread evenly over the image"
    sites: ClassVar[tuple[str, ...]] = ("vision",)

    def sizes(self, shape: ModelShape, cr: float, schedule: _policy.Counts | None = None) -> Plan:
        return flat_plan(shape.visual_tokens, shape.layers, ratio(self.counts, shape, cr))

    def why_frozen(self) -> str:
        return _policy.CONSTANT

    def vision(self, signals: VisionSignals, stage: Stage) -> Selection:
        return Selection(torch.tensor(lattice(signals.grid, stage.keep)))
