"""Made-up schedules, for runs whose answers do not matter."""

from __future__ import annotations

from dataclasses import dataclass

from edgeprune.errors import SpecError
from edgeprune.policies import Policy
from edgeprune.policies._schedules import MOST_DROPS, falling
from edgeprune.spec import ModelShape, Plan, budget


@dataclass(frozen=True)
class MadeUp:
    """r_1 ... r_L that no calibration gave."""

    counts: tuple[int, ...]


def planned(policy: Policy, shape: ModelShape, cr: float, counts: tuple[int, ...] = ()) -> Plan:
    """A method's plan; where it needs a calibrated schedule, of `counts` or of `declining` ones.

    SpecError where the ratio cannot be reached.
    """
    if policy.entry_tokens(shape, cr) is None:
        return policy.plan(shape, cr)
    visual, layers, first = shape.encoded, shape.layers, policy.entry_tokens(shape, cr)
    ratio = shape.ratio_behind(cr)
    if shape.convolutions and not counts:
        ends = [n for n in range(1, layers) if n not in shape.convolutions][:MOST_DROPS]
        counts = falling(first or visual, layers, tuple(ends), budget(visual, layers, ratio))
    counts = counts or declining(visual, layers, ratio)
    return policy.plan(shape, cr, MadeUp(counts))


def declining(visual: int, layers: int, cr: float) -> tuple[int, ...]:
    """A made-up schedule of the usual form: r_l falls by a constant factor, the sum is exact.

    r_1 = min(V, 4V / CR), as UTP has it; the factor is found by bisection. SpecError where r_1
    alone is more than the sum, which is V L / CR.
    """
    total, first = budget(visual, layers, cr), min(visual, round(4 * visual / cr))
    if first > total:
        raise SpecError(
            f"no schedule of {layers} layers reaches CR {cr:g}: {first} of {visual} visual tokens"
            f" enter the first, all layers together may have {total}; take a smaller CR or more"
            " layers"
        )
    low, high = 0.0, 1.0
    for _ in range(60):
        factor = (low + high) / 2
        if sum(first * factor**layer for layer in range(layers)) < total:
            low = factor
        else:
            high = factor
    counts = [round(first * low**layer) for layer in range(layers)]
    counts[-1] = max(0, counts[-1] + total - sum(counts))
    spare, layer = total - sum(counts), layers - 1
    while spare:  # rounding left a token or two: give or take them where order allows
        step = 1 if spare > 0 else -1
        if layer and 0 <= counts[layer] + step <= counts[layer - 1]:
            counts[layer] += step
            spare -= step
        layer = layer - 1 if layer > 1 else layers - 1
    return tuple(sorted(counts, reverse=True))
