"""What two neighbouring decisions cost at least, whatever the tokens between them.

Decision d is given tokens X', drops those that it ranks below a cut and hands the others on: X. In
the problem the X of one decision is the X' of the next. Here each decision chooses its own X' and
cut, and a multiplier on every token between two decisions pays for their differences, so any
multipliers give a lower bound. The counts of X' and X are kept exactly, and all samples share them.
Where every count is known the bound is the loss itself: the first decision is given all tokens, so
its X is what truly stays, and so on. That is why counts are branched on.

Counts come in cells, intervals of one width. A count in [low, high] says of some tokens that they
are alive: those above which fewer than `low` others can be; and of some that they are gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.calib.solvers._problem import Floats, Ints, Problem

Real = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]
Kind = type[np.float32] | type[np.float64]


@dataclass(frozen=True, eq=False)
class Tokens:
    """A problem with tokens in one fixed order: [L-1, S, n] each."""

    price: Floats  # radians lost where a decision drops a token
    rank: Ints  # of a token at a decision
    order: Ints  # tokens by rank

    @classmethod
    def of(cls, problem: Problem) -> Tokens:
        base = problem.start[:, :1]
        indices, prices, ranks = problem.start, [], []
        for price, carry in zip(problem.prices, problem.carry, strict=True):
            prices.append(price.take(indices))
            ranks.append(indices - base)
            indices = carry.take(indices)
        rank = np.array(ranks)
        return cls(np.array(prices), rank, np.argsort(rank, axis=-1))

    @property
    def size(self) -> tuple[int, int, int]:
        decisions, samples, count = self.price.shape
        return decisions, samples, count


@dataclass(frozen=True, eq=False)
class Box:
    """Counts between `low` and `high`: [L-1] each, and what they say of tokens."""

    low: Ints
    high: Ints
    width: int  # of a cell

    @cached_property
    def starts(self) -> list[Ints]:
        """The least count of each cell."""
        return [np.arange(a, b + 1, self.width) for a, b in zip(self.low, self.high, strict=True)]

    def cell(self, d: int, number: int) -> range:
        """The counts of a cell; of the last one, `high` is the last."""
        start = int(self.starts[d][number])
        return range(start, start + self.width)

    def unspent(self, units: Ints) -> int:
        """What the counts of cells may spend beyond the least of each, all together."""
        return sum(
            int((units[np.minimum(start + self.width - 1, most)] - units[start]).max())
            for start, most in zip(self.starts, self.high, strict=True)
        )

    def certain(self, tokens: Tokens) -> tuple[list[Mask], list[Mask]]:
        """Tokens that are surely alive, and surely gone, before each decision and after the last:
        L times [S, n]."""
        _, samples, count = tokens.size
        alive, gone = [np.ones((samples, count), bool)], [np.zeros((samples, count), bool)]
        for order, low, high in zip(tokens.order, self.low, self.high, strict=True):
            lives, is_gone = (np.take_along_axis(x[-1], order, -1) for x in (alive, gone))
            most_above = (~is_gone).cumsum(-1) - ~is_gone
            least_above = lives.cumsum(-1) - lives
            for found, kept in (
                (alive, lives & (most_above < low)),
                (gone, is_gone | (least_above >= high)),
            ):
                found.append(np.empty_like(kept))
                np.put_along_axis(found[-1], order, kept, -1)
        return alive, gone


@dataclass(frozen=True, eq=False)
class Pair:
    """One decision under multipliers: what each token costs that it keeps, or drops.

    A pool [S, N] has the tokens of each sample that may be alive before, by rank. What cannot be
    costs infinity.
    """

    count: int  # n
    tokens: Ints  # [S, N]
    keep: Real  # [S, N]
    drop: Real  # [S, N]
    omit: Real  # [S, N] 0, or infinity for a token that is surely in X'
    above: Real  # [N+1, S, C] least cost of a count in a cell of X, above each cut
    below: Real  # [N+1, S, M] least cost of numbers of drops below it: `reach` from m - offset on
    offset: int
    table: Floats  # [C', C] mean over samples, by cells of X' and X

    def chosen(self, box: Box, d: int, entered: int, left: int) -> tuple[Mask, Mask]:
        """X' and X of the cheapest answer with counts in these cells: [S, n] each."""
        before, after = box.cell(d - 1, entered), box.cell(d, left)
        fewest, most = before.start - after.stop + 1, before.stop - 1 - after.start
        cut = (self.above[:, :, left] + self.below[:, :, fewest + self.offset]).argmin(0)[:, None]
        is_above = np.arange(self.keep.shape[1]) < cut
        kept = _cheapest(np.where(is_above, self.keep, np.inf), self.omit, after)
        drops = range(max(0, fewest), most + 1)
        dropped = _cheapest(np.where(is_above, np.inf, self.drop), self.omit, drops)
        return self._unpooled(kept | dropped), self._unpooled(kept)

    def _unpooled(self, marks: Mask) -> Mask:
        """[S, N] -> [S, n]."""
        full = np.zeros((len(marks), self.count), bool)
        np.put_along_axis(full, self.tokens, marks, -1)
        return full


def _cheapest(cost: Real, omit: Real, limits: range) -> Mask:
    """Marks of the cheapest of each row, as many within `limits` as cost least: [S, N]."""
    must = np.isinf(omit) & np.isfinite(cost)
    order = np.argsort(np.where(must, -np.inf, cost), axis=-1, kind="stable")
    worth = (must | (cost < 0)).sum(-1)
    taken = np.arange(cost.shape[1]) < np.clip(worth, limits.start, limits.stop - 1)[:, None]
    marks = np.empty(cost.shape, bool)
    np.put_along_axis(marks, order, taken, -1)
    return marks & np.isfinite(cost)


def first_table(tokens: Tokens, box: Box, after: Floats) -> Floats:
    """Of the first decision, which is given all tokens: [1, C]. `after` [S, n] are multipliers."""
    order = tokens.order[0]
    keep, drop = (np.take_along_axis(x, order, -1) for x in (after, tokens.price[0]))
    kept = np.pad(keep.cumsum(-1), ((0, 0), (1, 0)))
    dropped = np.pad(drop.cumsum(-1), ((0, 0), (1, 0)))
    costs = (kept + dropped[:, -1:] - dropped).mean(0)[box.low[0] : box.high[0] + 1]
    return np.minimum.reduceat(costs, box.starts[0] - box.low[0])[None]


def pair(
    tokens: Tokens,
    box: Box,
    d: int,
    before: Floats,
    after: Floats,
    certain: tuple[list[Mask], list[Mask]],
    kind: Kind,
) -> Pair:
    """Decision d > 0 of a box with its table; `before` and `after` [S, n] are multipliers."""
    order, (alive, gone) = tokens.order[d], certain

    def ranked(x: Any) -> Any:
        return np.take_along_axis(x, order, -1)

    absent = ranked(gone[d])
    size = int((~absent).sum(-1).max())
    pool = np.argsort(absent, axis=-1, kind="stable")[:, :size]

    def pooled(x: Any) -> Any:
        return np.take_along_axis(ranked(x), pool, -1)

    keep = pooled(after - before).astype(kind)
    drop = pooled(tokens.price[d] - before).astype(kind)
    absent = np.take_along_axis(absent, pool, -1)
    keep[absent | pooled(gone[d + 1])] = np.inf
    drop[absent | pooled(alive[d + 1])] = np.inf
    omit: Real = np.where(pooled(alive[d]), np.inf, 0.0).astype(kind)
    above, below, offset = _parts(keep, drop, omit, box, d, kind)
    table = _table(above, below, offset, box, d)
    indices = np.take_along_axis(order, pool, -1)
    return Pair(order.shape[1], indices, keep, drop, omit, above, below, offset, table)


def _parts(
    keep: Real, drop: Real, omit: Real, box: Box, d: int, kind: Kind
) -> tuple[Real, Real, int]:
    """`above`, `below` and `offset` of a pair."""
    low, high, most = int(box.low[d]), int(box.high[d]), int(box.high[d - 1])
    starts, width = box.starts[d], box.width
    above = _sums(keep, omit, high, kind)[:, :, low : high + 1]
    below = _sums(drop[:, ::-1], omit[:, ::-1], most - low, kind)[::-1]
    if width == 1:
        return above, below, 0
    above = np.minimum.reduceat(above, starts - low, axis=2)
    offset = max(0, int(starts[-1]) + width - 1 - int(box.low[d - 1]))
    # counts of two cells differ by 2 width - 1 numbers, fewer than none among them
    return above, _windows(below, offset, 2 * width - 1), offset


def _table(above: Real, below: Real, offset: int, box: Box, d: int) -> Floats:
    """Mean over samples of the best cut, for every two cells."""
    entered, starts, width = box.starts[d - 1], box.starts[d], box.width
    table = np.full((len(entered), len(starts)), np.inf)
    for column, start in enumerate(starts.tolist()):
        first = int(entered[0]) - (start + width - 1) + offset
        row = max(0, -first)  # of single counts: a count never rises
        options = below[start:, :, first + row : first + width * len(entered) : width]
        if row < len(entered):
            best = (above[start:, :, column, None] + options).min(0)
            table[row:, column] = best.mean(0, dtype=np.float64)
    return table


def _sums(cost: Real, omit: Real, most: int, kind: Kind) -> Real:
    """Least cost of so many of the first p: [S, N] -> [N+1, S, most+1]."""
    samples, count = cost.shape
    sums = np.empty((count + 1, samples, most + 1), kind)
    sums[0], sums[0, :, 0] = np.inf, 0
    for p in range(count):
        left, one = omit[:, p, None], cost[:, p, None]
        np.minimum(sums[p, :, 1:] + left, sums[p, :, :-1] + one, out=sums[p + 1, :, 1:])
        sums[p + 1, :, 0] = sums[p, :, 0] + left[:, 0]
    return sums


def _windows(values: Real, before: int, reach: int) -> Real:
    """Least of `reach` neighbours along the last axis, from `before` places before the first on."""
    if before:
        empty = np.full((*values.shape[:2], before), np.inf, values.dtype)
        values = np.concatenate([empty, values], axis=2)
    done = 1
    while done < reach:
        step = min(done, reach - done)
        values = values.copy()
        np.minimum(values[..., :-step], values[..., step:].copy(), out=values[..., :-step])
        done += step
    return values
