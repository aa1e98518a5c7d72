"""Counts that fall after given layers, and the merged tokens among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from edgeprune.errors import SpecError
from edgeprune.spec import ModelShape, Plan, Stage, budget, floor_cr, plan_from_counts

MOST_DROPS = 8  # `_near` tries 3 counts after each


def after_layer(method: str, last: int, shape: ModelShape, cr: float) -> Plan:
    """Layers 1..`last` see all V tokens, all others (V L / CR - last V) / (L - last)."""
    tokens, layers = shape.visual_tokens, shape.layers
    pruned = layers - last
    keep = round((budget(tokens, layers, cr) - last * tokens) / pruned)
    if keep < 1:
        most = floor_cr(tokens, layers, last * tokens + pruned)
        advice = "set K=1 or " if last > 1 else ""
        raise SpecError(
            f"method {method} keeps all visual tokens in its first K={last} of {layers} layers,"
            f" so --cr is at most {most:g}, not {cr:g}; {advice}choose a smaller --cr or a"
            " method that prunes before the decoder, such as fastervlm"
        )
    return plan_from_counts(tokens, (tokens,) * last + (keep,) * pruned)


def scaled(depths: tuple[float, ...], shape: ModelShape) -> tuple[int, ...]:
    """The layers, of 1 .. L - 1 where there are so many, at given shares of the depth."""
    named = {max(1, round(shape.layers * depth)) for depth in depths}
    return tuple(sorted(set(map(shape.attending, named)) if shape.convolutions else named))


def layer_at(layer: int, shape: ModelShape) -> int:
    """The layer that --set K= names, one of 1 .. L - 1."""
    return layer_of("K", str(layer), 0, shape)


def layer_of(option: str, text: str, depth: float, shape: ModelShape) -> int:
    """The layer of an option that names one of 1 .. L - 1, or `auto`: a share of the depth."""
    layers, given = shape.layers, int(text) if text.isdecimal() else 0
    layer = scaled((depth,), shape)[0] if text == "auto" else given
    if not 1 <= layer < layers:
        raise SpecError(
            f"--set {option}= is a layer from 1 to {layers - 1} of {layers}; got {text!r}"
        )
    return shape.attending(layer)


def parse(text: str, shape: ModelShape) -> tuple[int, ...]:
    """The layers that --set stages= lists, rising; SpecError where it lists none that exist, or
    too many."""
    layers = shape.layers
    try:
        drops = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        drops = ()
    if not 1 <= len(drops) <= MOST_DROPS or drops[0] < 1 or drops[-1] >= layers:
        raise SpecError(
            f"--set stages= lists up to {MOST_DROPS} layers from 1 to {layers - 1}, such as 1,3;"
            f" got {text!r}"
        )
    return tuple(sorted(set(map(shape.attending, drops))))


def geometric(first: int, layers: int, drops: tuple[int, ...], q: float) -> tuple[int, ...]:
    """r_1 ... r_L where q of the `first` tokens, at least one, goes on after each of `drops`."""
    return stepped([max(1, round(first * q**n)) for n in range(len(drops) + 1)], layers, drops)


def falling(first: int, layers: int, drops: tuple[int, ...], wanted: int) -> tuple[int, ...]:
    """Counts with r_1 = `first` and one ratio q of them, whose sum is nearest to `wanted`.

    q is found by bisection; where rounding keeps the sum from being `wanted`, each count may move
    by one.
    """
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        less = sum(geometric(first, layers, drops, middle)) <= wanted
        low, high = (middle, high) if less else (low, middle)
    counts = geometric(first, layers, drops, low)
    levels = [counts[0], *(counts[drop] for drop in drops if drop < layers)]
    return min(_near(levels, layers, drops), key=lambda near: abs(sum(near) - wanted))


def _near(levels: list[int], layers: int, drops: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The same counts with each but the first moved by one at most, the least moved first."""
    moves = sorted(product((0, 1, -1), repeat=len(levels) - 1), key=lambda m: sum(map(abs, m)))
    near = [[n + d for n, d in zip(levels, (0, *move), strict=True)] for move in moves]
    return [
        stepped(counts, layers, drops)
        for counts in near
        if counts[-1] >= 1 and counts == sorted(counts, reverse=True)
    ]


def stepped(levels: Sequence[int], layers: int, drops: tuple[int, ...]) -> tuple[int, ...]:
    """A level for each layer: the first up to the first drop, and so on."""
    passed = (sum(1 for drop in drops if drop < layer) for layer in range(1, layers + 1))
    return tuple(levels[n] for n in passed)


def too_late(method: str, first: int, shape: ModelShape, least: int, cr: float) -> SpecError:
    """The error where tokens enough to pass `cr` are in the decoder before the first drop."""
    most = floor_cr(shape.visual_tokens, shape.layers, least)
    return SpecError(
        f"method {method} keeps all visual tokens up to layer {first} of {shape.layers}, so"
        f" --cr is at most {most:g}, not {cr:g}; choose a smaller --cr or a"
        " method that prunes before the decoder, such as fastervlm"
    )


def merge_candidates(live: int, keep: int) -> int:
    """Of the tokens pruned, those that SparseVLM merges: floor(0.3 p) + 1, p = live - keep."""
    return 3 * (live - keep) // 10 + 1


def with_merged(plan: Plan) -> Plan:
    """The plan with some of the survivors of each stage in the decoder merged tokens, by
    SparseVLM's rule on the p pruned ones: floor((floor(0.3 p) + 1) / 10) + 1.

    p counts those that the merged ones replace. One token at least is kept, so there may be fewer.
    """
    stages, live = list[Stage](), plan.visual_tokens
    for stage in plan.stages:
        if stage.site == "layer":
            merged = min(_clusters(live, stage.keep), stage.keep - 1)
            stage = replace(stage, keep=stage.keep - merged, merged=merged)
        stages.append(stage)
        live = stage.survivors
    return replace(plan, stages=tuple(stages))


def _clusters(live: int, survivors: int) -> int:
    merged = 1
    while merged <= merge_candidates(live, survivors - merged) // 10:
        merged += 1
    return merged
