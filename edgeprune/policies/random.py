"""Control: a random set of tokens, drawn once at export and the same for every image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from edgeprune.errors import SpecError
from edgeprune.policies import _policy
from edgeprune.policies._counts import ratio
from edgeprune.policies._policy import Selection
from edgeprune.policies._signals import VisionSignals
from edgeprune.spec import ModelShape, Plan, Stage, flat_plan


@dataclass(frozen=True)
class Policy(_policy.Policy):
    seed: int = 0
    counts: str = "auto"  # or the tokens that stay, such as 64; --cr follows

    summary: ClassVar[str] = "control: random tokens, drawn once at export"
    sites: ClassVar[tuple[str, ...]] = ("vision",)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 63:
            raise SpecError(f"--seed is a whole number from 0, below 2^63; got {self.seed}")

    def sizes(self, shape: ModelShape, cr: float, schedule: _policy.Counts | None = None) -> Plan:
        return flat_plan(shape.visual_tokens, shape.layers, ratio(self.counts, shape, cr))

    def why_frozen(self) -> str:
        return _policy.CONSTANT

    def vision(self, signals: VisionSignals, stage: Stage) -> Selection:
        order = np.random.default_rng(self.seed).permutation(signals.features.shape[1])
        return Selection(torch.tensor(sorted(order[: stage.keep].tolist())))
