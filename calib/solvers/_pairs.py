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
MOST_CUTS = 192
"""Rows of cuts: with more tokens, neighbouring positions share one."""
MEMORY = 32_000_000
"""Numbers in the sums of all cuts, about: 256 MB."""


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

    @cached_property
    def flat(self) -> tuple[Ints, Ints]:
        """`order` and `rank` as indices into all samples: into tokens, and into tokens by rank."""
        _, samples, count = self.size
        base = count * np.arange(samples)[:, None]
        return self.order + base, self.rank + base


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
        """What the counts of cells may spend beyond the least of each, all together; `units`
        [L-1, n + 1] are those of layers."""
        return sum(
            int((own[np.minimum(start + self.width - 1, most)] - own[start]).max())
            for own, start, most in zip(units, self.starts, self.high, strict=True)
        )

    def certain(self, tokens: Tokens) -> tuple[list[Mask], list[Mask]]:
        """Tokens that are surely alive, and surely gone, before each decision and after the last:
        L times [S, n]."""
        _, samples, count = tokens.size
        alive, gone = [np.ones((samples, count), bool)], [np.zeros((samples, count), bool)]
        for order, place, low, high in zip(*tokens.flat, self.low, self.high, strict=True):
            lives, is_gone = alive[-1].take(order), gone[-1].take(order)
            most_above = (~is_gone).cumsum(-1) - ~is_gone
            least_above = lives.cumsum(-1) - lives
            alive.append((lives & (most_above < low)).take(place))
            gone.append((is_gone | (least_above >= high)).take(place))
        return alive, gone


def first_table(tokens: Tokens, box: Box, after: Floats) -> Floats:
    """Of the first decision, which is given all tokens: [1, C]. `after` [S, n] are multipliers."""
    order = tokens.order[0]
    keep, drop = (np.take_along_axis(x, order, -1) for x in (after, tokens.price[0]))
    kept = np.pad(keep.cumsum(-1), ((0, 0), (1, 0)))
    dropped = np.pad(drop.cumsum(-1), ((0, 0), (1, 0)))
    costs = (kept + dropped[:, -1:] - dropped).mean(0)[box.low[0] : box.high[0] + 1]
    return np.minimum.reduceat(costs, box.starts[0] - box.low[0])[None]


def pair_table(
    tokens: Tokens,
    box: Box,
    d: int,
    before: Floats,
    after: Floats,
    certain: tuple[list[Mask], list[Mask]],
) -> Floats:
    """Of decision d > 0, mean over samples, by cells of X' and X: [C', C]. `before` and `after`
    [S, n] are multipliers.

    Tokens that may be alive before are a pool [S, N] by rank. What cannot be costs infinity.
    """
    alive, gone = certain
    order = tokens.flat[0][d]
    absent = gone[d].take(order)
    size = int((~absent).sum(-1).max())
    if size < order.shape[1]:
        pool = np.argsort(absent, axis=-1, kind="stable")[:, :size]
        order = np.take_along_axis(order, pool, -1)
        absent = gone[d].take(order)
    keep = (after - before).take(order)
    drop = (tokens.price[d] - before).take(order)
    keep[absent | gone[d + 1].take(order)] = np.inf
    drop[absent | alive[d + 1].take(order)] = np.inf
    first, last = _cuts(size, len(order))
    must, omit = alive[d].take(order), None
    if must.any() and len(first) > size:  # else a token at a cut would have to be in both parts
        omit = np.where(must, np.inf, 0.0)
    return _table(*_parts(keep, drop, omit, first, last, box, d), last, box, d)


def _cuts(size: int, samples: int) -> tuple[Ints, Ints]:
    """First and last position of each row of cuts: 0 .. size in rows as small as allowed.

    A token between two cuts of a row may be kept, dropped, or both.
    """
    rows = min(MOST_CUTS, max(1, MEMORY // (samples * (size + 1))))
    width = -(-(size + 1) // rows)
    first = np.arange(0, size + 1, width)
    return first, np.minimum(first + width - 1, size)


def _parts(
    keep: Floats, drop: Floats, omit: Floats | None, first: Ints, last: Ints, box: Box, d: int
) -> tuple[Floats, Floats, int]:
    """Least cost of the counts of each cell of X above a cut [P, S, C], and below it of as many
    drops as cells that are so far apart may differ by [P, S, M]; how far they are in the first
    column, cells of X' less cells of X. `omit` [S, N] is infinity for tokens that are in X'."""
    low, high, most = int(box.low[d]), int(box.high[d]), int(box.high[d - 1])
    starts, width = box.starts[d], box.width
    above = _sums(keep, omit, high, last)[:, :, low:-1]
    backwards = None if omit is None else omit[:, ::-1]
    below = _sums(drop[:, ::-1], backwards, most - low, keep.shape[1] - first[::-1])[::-1]
    fewest = int(box.low[d - 1]) - low - width + 1  # drops between the first cells of X' and X
    apart = max(1 - len(starts), -((fewest + 2 * width - 2) // width))
    if width == 1:
        return above, below[:, :, fewest + apart : -1], apart
    begin = fewest + width * np.arange(apart, len(box.starts[d - 1]))
    end = np.minimum(begin + 2 * width - 1, most - low + 1)
    edges = np.stack([np.maximum(begin, 0), end]).T.ravel()
    above = np.minimum.reduceat(above, starts - low, axis=2)
    return above, np.minimum.reduceat(below, edges, axis=2)[:, :, ::2], apart


def _table(above: Floats, below: Floats, apart: int, last: Ints, box: Box, d: int) -> Floats:
    """Mean over samples of the best cut, for every two cells."""
    entered, starts = box.starts[d - 1], box.starts[d]
    table = np.full((len(entered), len(starts)), np.inf)
    for column, start in enumerate(starts.tolist()):
        row = max(0, column + apart)  # fewer enter than are kept: none
        if row < len(entered):
            cut = int(np.searchsorted(last, start))
            options = below[cut:, :, row - column - apart : len(entered) - column - apart]
            table[row:, column] = (above[cut:, :, column, None] + options).min(0).mean(0)
    return table


def _sums(cost: Floats, omit: Floats | None, most: int, stops: Ints) -> Floats:
    """Least cost of so many of the first p, for each p of `stops`, which rise: [P, S, most+2]; of
    `most` + 1 infinity."""
    samples = len(cost)
    found = np.full((len(stops), samples, most + 2), np.inf)
    sums = np.full((samples, most + 1), np.inf)
    sums[:, 0] = 0
    one = np.empty((samples, most))
    done = 0
    for row, stop in enumerate(stops.tolist()):
        for p in range(done, stop):
            reach = min(p + 1, most)  # no more are there
            np.add(sums[:, :reach], cost[:, p, None], out=one[:, :reach])
            if omit is not None:
                sums += omit[:, p, None]
            np.minimum(sums[:, 1 : reach + 1], one[:, :reach], out=sums[:, 1 : reach + 1])
        found[row, :, :-1] = sums
        done = stop
    return found
