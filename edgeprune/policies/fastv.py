"""FastV: after layer K, the tokens that the last prompt token attends to most in layer K.

The score is the last prompt token's attention after the softmax, head mean, in layer K. Layers 1..K
see every visual token, all others see the R that stay, and R follows from the CR:
(V L / CR - K V) / (L - K). Positions are kept.

Deviations:
- The paper gives K and R; here K is given and R solved for, unless `counts=` gives it.
- The set is chosen once, at prefill, as in the released code with a KV cache; the paper chooses
  again at each step.
- The released code with a KV cache runs layer K twice and caches its keys twice; here once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edgeprune.policies import _policy
from edgeprune.policies._counts import ratio
from edgeprune.policies._policy import Selection
from edgeprune.policies._schedules import after_layer, layer_at
from edgeprune.policies._select import top
from edgeprune.policies._signals import LayerSignals
from edgeprune.spec import ModelShape, Plan, Stage


@dataclass(frozen=True)
class Policy(_policy.Policy):
    K: int = 2  # layers that see every visual token
    counts: str = "auto"  # or the tokens that stay after layer K, such as 128; --cr follows

    paper: ClassVar[str] = (
        "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large"
        " Vision-Language Models"
    )
    summary: ClassVar[str] = "after layer K, the tokens that the last prompt token attends to most"
    sites: ClassVar[tuple[str, ...]] = ("layer",)
    needs: ClassVar[tuple[str, ...]] = ("text",)

    def sizes(self, shape: ModelShape, cr: float, schedule: _policy.Counts | None = None) -> Plan:
        last = layer_at(self.K, shape)
        return after_layer("fastv", last, shape, ratio(self.counts, shape, cr, last))

    def why_frozen(self) -> str:
        return ""

    def layer(self, signals: LayerSignals, stage: Stage, live: Stage) -> Selection:
        return Selection(top(signals.last_query_attention(), live.keep))
