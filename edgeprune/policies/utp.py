"""UTP, unbiased token pruning: what to prune by position-agnostic attention, where by a schedule.

URE (Sec. 3.2, Eq. 2): in the first layers the last prompt token's attention is scored with every
visual token at one position, the middle of the picture, so that nearness earns nothing.
UTR (Sec. 3.3, Eq. 3-5): r_2 ... r_L from an integer program over calibration samples.
Above CR 4 the picture enters the decoder with r_1 = 4V / CR tokens, chosen by [CLS] attention
(by received attention where the encoder has no [CLS]).
Positions inside the decoder are kept. The paper's budget V*L/CR - V presumes r_1 = V; here r_1
is what really enters, so that the CR asked for is the CR reached.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from edgeprune.errors import SpecError
from edgeprune.policies import _policy
from edgeprune.policies._policy import Selection
from edgeprune.policies._select import top
from edgeprune.policies._signals import LayerSignals, VisionSignals
from edgeprune.spec import ModelShape, Plan, Stage, plan_from_counts


@dataclass(frozen=True)
class Policy(_policy.Policy):
    agnostic_layers: int = 3  # layers 1..3 score without positions

    paper: ClassVar[str] = "Unbiased Token Pruning for Efficient Large Multimodal Models"
    summary: ClassVar[str] = "position-agnostic attention, per-layer counts from an integer program"
    sites: ClassVar[tuple[str, ...]] = ("vision", "layer")
    needs: ClassVar[tuple[str, ...]] = ("text", "calibration", "[CLS] above CR 4")

    def first(self, shape: ModelShape, cr: float) -> int | None:
        return min(shape.visual_tokens, round(4 * shape.visual_tokens / cr))

    def plan(self, shape: ModelShape, cr: float, schedule: _policy.Counts | None = None) -> Plan:
        if schedule is None:
            raise SpecError("method utp needs a schedule: calibrate first, or give --schedule FILE")
        return plan_from_counts(shape.visual_tokens, tuple(schedule.counts))

    def vision(self, signals: VisionSignals, stage: Stage) -> Selection:
        return Selection(top(signals.salience(), stage.keep))

    def layer(self, signals: LayerSignals, stage: Stage, live: Stage) -> Selection:
        return Selection(top(self.record(stage.layer - 1, signals), live.keep))

    def record(self, layer: int, signals: LayerSignals) -> Tensor:
        agnostic = signals.middle if layer <= self.agnostic_layers else None
        return signals.last_query_attention(agnostic)
