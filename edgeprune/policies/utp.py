"""UTP, unbiased token pruning: what to prune by position-agnostic attention, where by a schedule.

URE (Sec. 3.2, Eq. 2): in the first layers the last prompt token's attention is scored with every
visual token at one position, the middle of the image, so that nearness earns nothing.
UTR (Sec. 3.3, Eq. 3-5): r_2 ... r_L from an integer program over calibration samples.
Above CR 4 the image enters the decoder with r_1 = 4V / CR tokens, chosen by [CLS] attention
(by received attention where the encoder has no [CLS]).

Ablations of the paper: `ure=off` scores with plain attention everywhere; `utr=off` calibrates
nothing and prunes once, after layer K, as the paper's baseline FastV does (Table 2); `position` is
where URE puts all visual tokens, `none` leaves rotary embedding out of its attention (Tables 3, 4).

Not of the paper: `query=text` scores, in every layer, by the mean attention of all tokens after the
image in place of the last one's. It helps where the last token is the end of a chat template and
looks at what was asked for only in late layers.

Deviations:
- The paper's budget V*L/CR - V presumes r_1 = V; here r_1 is what really enters, so that the CR
  asked for is the CR reached.
- Above CR 4 `utr=off` too enters with 4V / CR tokens, which the paper does not do.

Open in the paper, chosen here; there is no released code:
- Positions inside the decoder are kept.
- One schedule is best for the sum over all samples. `--solver paper` averages the best ones of each
  sample, `--solver exact` proves the optimum.
- The output feature whose angle is ell_l is the last prompt token's, after the final norm.
- In the first layers calibration collects the position-agnostic attention that will be used there.
- Under M-RoPE the middle is taken of each of the three positions.
- Of several tiles (crops, images, frames) all tokens are ranked together.
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
from edgeprune.spec import ModelShape, Plan, Stage, budget, floor_cr, plan_from_counts

POSITIONS = ("middle", "start", "end", "none")
QUERIES = ("last", "text")


@dataclass(frozen=True)
class Policy(_policy.Policy):
    agnostic_layers: int = 3  # layers 1..3 score without positions
    ure: bool = True  # off: no layer does
    utr: bool = True  # off: no schedule, all pruning after layer K
    K: int = 2  # with utr=off, layers that see every token that enters
    position: str = "middle"  # of all visual tokens in URE: middle, start, end or none
    query: str = "last"  # whose attention scores: the last token's, or text: all after the image

    paper: ClassVar[str] = "Unbiased Token Pruning for Efficient Large Multimodal Models"
    summary: ClassVar[str] = "position-agnostic attention, per-layer counts from an integer program"
    sites: ClassVar[tuple[str, ...]] = ("vision", "layer")
    needs: ClassVar[tuple[str, ...]] = ("text", "calibration", "[CLS] above CR 4")

    def __post_init__(self) -> None:
        if self.position not in POSITIONS:
            known = ", ".join(POSITIONS)
            raise SpecError(f"--set position= is one of {known}; got {self.position!r}")
        if self.query not in QUERIES:
            raise SpecError(f"--set query= is one of {', '.join(QUERIES)}; got {self.query!r}")
        if self.query == "text" and self.position == "none":
            raise SpecError("--set position=none is for query=last; choose one of the two")

    def entry_tokens(self, shape: ModelShape, cr: float) -> int | None:
        if not self.utr:
            return None
        return _entering(shape.behind_encoder(), shape.ratio_behind(cr))

    def sizes(self, shape: ModelShape, cr: float, schedule: _policy.Counts | None = None) -> Plan:
        if not self.utr:
            return plan_from_counts(shape.visual_tokens, self._two_steps(shape, cr))
        if schedule is None:
            raise SpecError("method utp needs a schedule: calibrate first, or give --schedule FILE")
        return plan_from_counts(shape.visual_tokens, tuple(schedule.counts))

    def vision(self, signals: VisionSignals, stage: Stage) -> Selection:
        return Selection(top(signals.salience(), stage.keep))

    def why_frozen(self) -> str:
        return ""

    def layer(self, signals: LayerSignals, stage: Stage, live: Stage) -> Selection:
        return Selection(top(self.calibration_scores(stage.layer - 1, signals), live.keep))

    def scoring(self, layer: int) -> str:
        """Whose attention scores, and whether every visual token is moved to one position."""
        moved = self._agnostic(layer) and self.position != "none"
        return f"query={self.query}" + ", one position" * moved

    def calibration_scores(self, layer: int, signals: LayerSignals) -> Tensor:
        agnostic = self._agnostic(layer)
        if agnostic and self.position == "none":
            return signals.last_query_likeness()
        anchors = signals.anchors
        at = {"start": anchors.first, "middle": anchors.middle, "end": anchors.last}
        position = at[self.position] if agnostic else None
        if self.query == "text":
            return signals.text_attention(position).mean((0, 1))
        return signals.last_query_attention(position)

    def _agnostic(self, layer: int) -> bool:
        """Whether a layer (1-based) scores without positions."""
        return self.ure and layer <= self.agnostic_layers

    def _two_steps(self, shape: ModelShape, cr: float) -> tuple[int, ...]:
        """r_1 in layers 1..K, what the budget leaves in all others."""
        tokens, layers, first = shape.visual_tokens, shape.layers, _entering(shape, cr)
        if not 1 <= self.K < layers:
            raise SpecError(f"--set K= is a layer from 1 to {layers - 1} of {layers}; got {self.K}")
        last = shape.attending(self.K)
        pruned = layers - last
        keep = round((budget(tokens, layers, cr) - last * first) / pruned)
        if keep < 1:
            most = floor_cr(tokens, layers, last * first + pruned)
            raise SpecError(
                f"method utp with utr=off keeps {first} visual tokens in its first K={last} of"
                f" {layers} layers, so --cr is at most {most:g}, not {cr:g}; choose a smaller --cr,"
                " a smaller K, or utr=on"
            )
        return (first,) * last + (min(keep, first),) * pruned


def _entering(shape: ModelShape, cr: float) -> int:
    """r_1: all visual tokens up to CR 4, 4V / CR above."""
    return min(shape.visual_tokens, round(4 * shape.visual_tokens / cr))
