"""LLaVolta, used without training: after layer K, averages of neighbouring tokens go on.

Layers 1..K see all V tokens. Then their hidden states, in reading order, are cut into R runs of
equal length and each run becomes its mean, at the position of its token floor((S - 1) / 2) of S.
R follows from the CR: (V L / CR - K V) / (L - K). K is 2 of 32 layers, scaled to L.
Nothing is scored, so no text is needed and no image is treated unlike another.

Deviations:
- The paper trains with this compression and evaluates some of its models with none; here it is
  applied to a model that was not trained for it, as UTP's comparison does.
- UTP's comparison does not say its K and S; K = 2 with S = 5 is what CR 4 gives.
- The released code cuts runs of a whole number of tokens and leaves out what remains; here the runs
  of one image may differ by one token, so that every count can be reached and none is left out.
- It averages positions in fp16, which is off by one above 2,048; here they are integers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import torch

from edgeprune.policies import _policy
from edgeprune.policies._clusters import average
from edgeprune.policies._counts import ratio
from edgeprune.policies._policy import Selection
from edgeprune.policies._schedules import after_layer, layer_of
from edgeprune.policies._signals import LayerSignals
from edgeprune.spec import ModelShape, Plan, Stage

DEPTH = 2 / 32


@dataclass(frozen=True)
class Policy(_policy.Policy):
    K: str = "auto"  # layers that see every visual token; auto: 2 of 32
    counts: str = "auto"  # or the averages that go on, such as 115; --cr follows

    paper: ClassVar[str] = (
        "LLaVolta: Efficient Multi-modal Models via Stage-wise Visual Context Compression"
    )
    summary: ClassVar[str] = "after layer K, averages of neighbouring tokens"
    sites: ClassVar[tuple[str, ...]] = ("layer",)

    def looks_at_attention(self) -> bool:
        return False

    def sizes(self, shape: ModelShape, cr: float, schedule: _policy.Counts | None = None) -> Plan:
        last = layer_of("K", self.K, DEPTH, shape)
        plan = after_layer("llavolta", last, shape, ratio(self.counts, shape, cr, last))
        stages = (replace(stage, keep=0, merged=stage.keep) for stage in plan.stages)
        return replace(plan, stages=tuple(stages))

    def why_frozen(self) -> str:
        return _policy.MERGES

    def layer(self, signals: LayerSignals, stage: Stage, live: Stage) -> Selection:
        tokens = signals.visual[0]
        edges = runs(signals.visual_tokens, stage.merged)
        owners = [run for run, (first, end) in enumerate(edges) for _ in range(first, end)]
        own = torch.tensor(owners, device=tokens.device)[: tokens.shape[0]]
        indices = torch.arange(live.merged, device=tokens.device)
        members = (indices[:, None] == own[None, :]).float()
        middles = torch.tensor([(first + end - 1) // 2 for first, end in edges])
        chosen = middles.to(tokens.device)[: live.merged]
        return Selection(chosen, lambda features: average(members, features))


def runs(count: int, parts: int) -> list[tuple[int, int]]:
    """Where each of `parts` runs of `count` tokens begins and ends; they differ by one at most."""
    edges = [i * count // parts for i in range(parts + 1)]
    return list(pairwise(edges))
