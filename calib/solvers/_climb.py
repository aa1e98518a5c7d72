"""Finds multipliers with which a relaxed answer gives a good bound: a cheap climb with free counts.

`_relaxed` keeps counts exactly, which takes a table for every two decisions. Here tokens pay a
price in each layer instead, and every sample may choose counts of its own; prices that differ by
sample, and are the same in the mean, make samples agree. Then a decision that cuts its ranking at p
keeps the tokens above p that are worth it and drops those below p that are worth it, so the best of
all cuts is found by running sums. The minima are smoothed, less and less, and each multiplier
follows the slope in steps of its own size (Adam). Nothing is proven here: any multipliers give a
bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.calib.solvers._bound import cheapest_ways
from edgeprune.calib.solvers._pairs import Box, Mask, Tokens
from edgeprune.calib.solvers._problem import Ints

Single = NDArray[np.float32]
RATE = 1.0
"""Of the first step, in prices of a token and layer; later ones are as much shorter as minima are
sharper."""
SMOOTH = 0.3, 0.03
"""How far minima are smoothed, in such prices: at first, and in the end."""
MEAN, SQUARE = 0.9, 0.99
"""What Adam's running means keep of the past."""
FORBIDDEN = np.float32(10)
"""Radians: more than any token costs."""


@dataclass(frozen=True, eq=False)
class Start:
    """Where a climb begins, or has come to."""

    tokens: Single  # [L-2, S, n] of each token between two decisions
    samples: Single  # [L-1, S] of a token of a layer, beside its price; over samples the mean is 0
    layers: Single  # [L-1] the same of all samples: a count is at an end of its interval
    price: float  # of a token in any layer

    @classmethod
    def of(cls, tokens: Tokens, price: float) -> Start:
        """What tokens cost without ranking."""
        decisions, samples, _ = tokens.size
        none = np.zeros((decisions, samples), np.float32)
        ways = cheapest_ways(tokens, price).astype(np.float32)
        return cls(ways, none, none[:, 0], price)


@dataclass(eq=False)
class _Course:
    """Adam: the way of some numbers, in steps of about 1."""

    least: float  # slopes below it give shorter steps
    mean: Any = 0.0
    square: Any = 0.0
    steps: int = 0

    def step(self, slope: Any) -> Any:
        self.steps += 1
        self.mean = MEAN * self.mean + (1 - MEAN) * slope
        self.square = SQUARE * self.square + (1 - SQUARE) * slope * slope
        size = np.sqrt(self.square / (1 - SQUARE**self.steps)) + self.least
        return self.mean / ((1 - MEAN**self.steps) * size)


def climb(
    tokens: Tokens,
    box: Box,
    budget: float,
    start: Start,
    steps: int,
    over: Callable[[], bool] = lambda: False,
) -> Start:
    """From a start on, in a box; `over` may end it early."""
    decisions, _, count = tokens.size
    if decisions < 2:
        return start
    slopes = _Slopes.of(tokens, box)
    at, own, shared, price = start.tokens.copy(), start.samples, start.layers, start.price
    unit = max(start.price, 1e-12)
    courses = [_Course(least) for least in (0.05, 2e-3, 2e-3, 1e-2)]
    first, last = SMOOTH
    for number in range(steps):
        if over():
            break
        sharpness = unit * first * (last / first) ** (number / max(1, steps - 1))
        rate = np.float32(RATE * sharpness / first)
        layer_prices = (price + shared[:, None] + own).astype(np.float32)
        slope, counts = slopes.at(at, layer_prices, np.float32(sharpness))
        mean = counts.mean(1)
        at += rate * courses[0].step(slope)
        own = own + rate * courses[1].step((counts - mean[:, None]) / count)
        own -= own.mean(1, keepdims=True)
        shared = _towards(shared, box, mean, rate, courses[2], count)
        price = max(0.0, price + float(rate * courses[3].step(mean.sum() / budget - 1)))
    return Start(at, own, shared, price)


def _towards(
    shared: Single, box: Box, mean: Single, rate: np.float32, course: _Course, count: int
) -> Single:
    """Prices that hold counts in their intervals: 0 where a count is inside."""
    ends = np.where(
        shared > 0, box.high, np.where(shared < 0, box.low, mean.clip(box.low, box.high))
    )
    moved = shared + rate * course.step((mean - ends) / count)
    crossed = moved * shared < 0
    return np.where(crossed, 0, moved).astype(np.float32)


@dataclass(frozen=True, eq=False)
class _Slopes:
    """Of the smoothed bound of a box. Arrays [L-2, S, N] have the tokens of a decision's pool by
    rank, of all decisions but the first."""

    shape: tuple[int, int, int]  # L-1, S, n
    first: tuple[Ints, Single]  # [S, n] by rank of decision 0: flat indices, prices
    lowest: Ints  # [L-1] counts of the box
    highest: Ints
    before: Ints  # flat indices into multipliers before a decision
    price: Single
    must: Mask  # surely alive before
    never_kept: Mask  # surely gone before or behind
    never_dropped: Mask  # surely gone before, or alive behind

    @classmethod
    def of(cls, tokens: Tokens, box: Box) -> _Slopes:
        decisions, samples, count = tokens.size
        alive, gone = (np.array(marks) for marks in box.certain(tokens))
        order = tokens.flat[0]
        absent = np.stack([gone[d].take(order[d]) for d in range(1, decisions)])
        size = max(1, int((~absent).sum(-1).max()))
        inner = order[1:]
        if size < count:
            pool = np.argsort(absent, axis=-1, kind="stable")[..., :size]
            inner = np.take_along_axis(inner, pool, -1)
        step = samples * count
        layers = step * np.arange(decisions - 1)[:, None, None]
        before, behind = inner + layers + step, inner + layers + 2 * step
        dead = gone.take(before)
        price = tokens.price.take(before).astype(np.float32)
        return cls(
            tokens.size,
            (order[0], tokens.price[0].take(order[0]).astype(np.float32)),
            box.low,
            box.high,
            inner + layers,
            price,
            alive.take(before),
            dead | gone.take(behind),
            dead | alive.take(behind),
        )

    def at(self, multipliers: Single, prices: Single, width: np.float32) -> tuple[Single, Single]:
        """Slopes [L-2, S, n], and counts [L-1, S] as samples choose them."""
        nothing = np.zeros((1, *multipliers.shape[1:]), np.float32)
        given = multipliers.take(self.before)
        keep = np.concatenate([multipliers[1:], nothing]).take(self.before) - given
        keep += prices[1:, :, None]
        keeps, kept = self._choice(keep, self.never_kept, width)
        drops, dropped = self._choice(self.price - given, self.never_dropped, width)
        above = _above(keeps - drops, self.lowest[1:], width)
        kept *= above
        dropped *= 1 - above
        order, leave = self.first
        stay = multipliers[0].take(order) + prices[0][:, None] - leave
        begun = _above(stay[None], self.lowest[:1], width, self.highest[:1])[0]
        slope = np.zeros(multipliers.shape, np.float32)
        slope.put(self.before, -(kept + dropped))
        handed = np.zeros(multipliers.shape, np.float32)
        handed[0].put(order, begun)
        handed[1:].put(self.before[:-1], kept[:-1])
        return slope + handed, np.concatenate([begun.sum(-1)[None], kept.sum(-1)])

    def _choice(self, cost: Single, never: Mask, width: np.float32) -> tuple[Single, Single]:
        """What each token adds at least, and how far it is chosen: tokens that must be alive are
        kept or dropped at any cost."""
        chosen = 1 / (1 + np.exp(np.clip(cost / width, -30, 30)))
        chosen[self.must] = 1
        chosen[never] = 0
        least = np.where(self.must, cost, np.minimum(cost, 0))
        return np.where(never, np.where(self.must, FORBIDDEN, np.float32(0)), least), chosen


def _above(gains: Single, lowest: Ints, width: np.float32, highest: Ints | None = None) -> Single:
    """How far each token is above the cut, which is at least at `lowest`: [.., S, N] each."""
    count = gains.shape[-1]
    sums = np.zeros((*gains.shape[:-1], count + 1), np.float32)
    np.cumsum(gains, -1, out=sums[..., 1:])
    cuts = np.arange(count + 1)
    barred = cuts < np.minimum(lowest, count)[:, None, None]
    if highest is not None:
        barred |= cuts > highest[:, None, None]
    np.copyto(sums, np.float32(np.inf), where=barred)
    weights = np.exp((sums.min(-1, keepdims=True) - sums) / (2 * width))
    weights /= weights.sum(-1, keepdims=True)
    above: Single = weights[..., :0:-1].cumsum(-1)[..., ::-1]
    return above
