"""Control: a random set of tokens, drawn once at export and the same for every picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from edgeprune.policies import _policy
from edgeprune.policies._signals import VisionSignals
from edgeprune.spec import ModelShape, Plan, Stage, plan_from_counts


@dataclass(frozen=True)
class Policy(_policy.Policy):
    seed: int = 0

    summary: ClassVar[str] = "control: random tokens, drawn once at export"
    sites: ClassVar[tuple[str, ...]] = ("vision",)

    def plan(self, shape: ModelShape, cr: float, schedule: _policy.Counts | None = None) -> Plan:
        keep = max(1, round(shape.visual_tokens / cr))
        return plan_from_counts(shape.visual_tokens, (keep,) * shape.layers)

    def vision(self, signals: VisionSignals, stage: Stage) -> Tensor:
        order = np.random.default_rng(self.seed).permutation(signals.features.shape[1])
        return torch.tensor(sorted(order[: stage.keep].tolist()))
