"""VTW, visual tokens withdrawal: after layer K no visual token goes on.

Nothing is scored: K layers see all V tokens, the others none, so CR = L / K and only
L ratios exist. K = round(L / CR); a CR that is further than one token per layer from L / K is
refused, and the refusal names its two neighbours. Positions are kept.

Deviation:
- The paper finds K by the KL divergence of outputs on samples; here the CR decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from edgeprune.errors import SpecError
from edgeprune.policies import _policy
from edgeprune.policies._policy import Selection
from edgeprune.policies._signals import LayerSignals
from edgeprune.spec import ModelShape, Plan, Stage, check_cr, plan_from_counts


@dataclass(frozen=True)
class Policy(_policy.Policy):
    paper: ClassVar[str] = (
        "Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid"
        " Inference"
    )
    summary: ClassVar[str] = "all visual tokens leave after one layer, CR = L / K only"
    sites: ClassVar[tuple[str, ...]] = ("layer",)

    def looks_at_attention(self) -> bool:
        return False

    def sizes(self, shape: ModelShape, cr: float, schedule: _policy.Counts | None = None) -> Plan:
        tokens, layers = shape.visual_tokens, shape.layers
        last = min(layers, max(1, round(layers / cr)))
        plan = plan_from_counts(tokens, (tokens,) * last + (0,) * (layers - last))
        try:
            check_cr(plan, cr)
        except SpecError as error:
            near = sorted({max(1, int(layers / cr)), min(layers, int(layers / cr) + 1)})
            choices = " or ".join(f"--cr {layers / k:.5g} (K={k})" for k in near)
            raise SpecError(
                f"method vtw drops all visual tokens after one layer K of {layers}, so CR is"
                f" {layers} / K and {cr:g} is not among them; choose {choices}"
            ) from error
        return plan

    def why_frozen(self) -> str:
        return ""

    def layer(self, signals: LayerSignals, stage: Stage, live: Stage) -> Selection:
        """All tokens or none, where the ratio is an input; a frozen site with none asks nobody."""
        return Selection(torch.arange(live.keep, device=signals.hidden.device))
