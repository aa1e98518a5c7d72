"""No pruning: the dense model, the measure of every other method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edgeprune.errors import SpecError
from edgeprune.policies import _policy
from edgeprune.spec import ModelShape, Plan


@dataclass(frozen=True)
class Policy(_policy.Policy):
    summary: ClassVar[str] = "no pruning: the dense model"

    def sizes(self, shape: ModelShape, cr: float, schedule: _policy.Counts | None = None) -> Plan:
        if cr != 1:
            raise SpecError(
                "--method none prunes nothing; leave out --cr, or choose another method"
            )
        return Plan(shape.visual_tokens, shape.layers)

    def why_frozen(self) -> str:
        return "its one ratio is 1"
