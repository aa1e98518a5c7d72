"""Counts of the first layers, one by one, with the tokens that truly are alive behind them.

The loss of a prefix is exact. What comes behind it is bounded by a relaxed answer: the multipliers
of the tokens that are alive, and the least cost of the decisions that are left. So a prefix whose
bound reaches a threshold holds nothing below it, and a walk through all others proves the
threshold, however many schedules there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from edgeprune.calib.solvers._pairs import Real
from edgeprune.calib.solvers._problem import Floats, Ints, Problem
from edgeprune.calib.solvers._relaxed import Relaxed, Spending

CHUNK = 400_000  # token indices of the prefixes that are looked at together


class _EnoughError(Exception):
    """The walk takes longer than it may."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """Some prefixes of as many layers: [K] each but for the tokens."""

    alive: Ints  # [K, S, W] indices of tokens at the next decision, rising, padded with dummies
    count: Ints
    cost: Floats  # radians lost so far
    left: Ints  # buckets of spending, as the answer counts them
    spent: Ints  # units, as the budget counts them


@dataclass(eq=False)
class Walk:
    """A walk through the prefixes of an answer's box."""

    problem: Problem
    spending: Spending
    answer: Relaxed  # in float64
    multipliers: Real  # [L-2, S, n] that it is the answer to
    threshold: float
    left: int  # token indices that may still be looked at
    over: Callable[[], bool]  # whether it has to end early
    least: float = field(default=np.inf, init=False)  # of all schedules seen below the threshold

    def ends(self) -> bool:
        """Whether all was seen; then nothing is below both the threshold and `least`."""
        start: Ints = self.problem.start.astype(np.int32)
        none = np.zeros(1, np.intp)
        left = none + self.answer.so_far[0].shape[1] - 1
        cost, count = np.zeros(1), none + self.problem.first
        whole = Prefix(start[None], count, cost, left, none)
        try:
            self._below(0, whole)
        except _EnoughError:
            return False
        return True

    @cached_property
    def _handed(self) -> list[Floats]:
        """The multiplier of each index, by decision."""
        orders, none = self.answer.tokens.order, np.zeros((1, *self.multipliers.shape[1:]))
        every = np.concatenate([self.multipliers, none])
        ranked = np.take_along_axis(every, orders, -1).astype(np.float64)
        return list(np.pad(ranked, ((0, 0), (0, 0), (0, 1))))

    @cached_property
    def _carry(self) -> list[Ints]:
        return [carry.astype(np.int32) for carry in self.problem.carry]

    @cached_property
    def _dummies(self) -> Ints:
        return self.problem.dummies.astype(np.int32)

    @cached_property
    def _behind(self) -> tuple[Ints, Ints]:
        """The least and most units that the decisions behind each one spend."""
        box, of = self.answer.box, self.spending.of
        least, most = (np.append(of(x)[::-1].cumsum()[::-1], 0)[1:] for x in (box.low, box.high))
        return least, most

    @cached_property
    def _level(self) -> Ints:
        """What they spend that enter with one count: [L-1, n + 1]."""
        units = self.spending.units
        behind: Ints = units.sum(0) - units.cumsum(0)
        return behind

    def _below(self, d: int, here: Prefix) -> None:
        self.left -= here.alive.size
        if self.left < 0 or self.over():
            raise _EnoughError
        parent, count, cost, left, spent = self._children(d, here)
        if d == self.problem.n_decisions - 1:
            self.least = min(self.least, float(cost.min(initial=np.inf)))
            return
        order = np.argsort(count, kind="stable")
        start = 0
        while start < len(order):
            widest = int(count[order[start]])
            most = max(1, CHUNK // (self.problem.n_samples * max(1, widest + widest // 4)))
            part = order[start : start + most]
            part = part[count[part] <= widest + widest // 4]
            start += len(part)
            width = int(count[part[-1]])
            kept = np.arange(width) < count[part, None, None]
            rows = np.where(kept, here.alive[parent[part], :, :width], self._dummies)
            alive = np.sort(self._carry[d].take(rows), axis=-1)
            self._below(d + 1, Prefix(alive, count[part], cost[part], left[part], spent[part]))

    def _children(self, d: int, here: Prefix) -> tuple[Ints, Ints, Floats, Ints, Ints]:
        """What may go on below the threshold: parent, count, cost, left and spent."""
        box, units, samples = self.answer.box, self.spending.units[d], self.problem.n_samples
        counts = np.arange(box.low[d], min(int(box.high[d]), int(here.count.max())) + 1)
        cells = (counts - box.low[d]) // box.width
        price = self.problem.prices[d].take(here.alive).sum(1) / samples
        pays = self._handed[d].take(here.alive).sum(1) / samples
        lost = np.pad(price[:, ::-1].cumsum(1)[:, ::-1], ((0, 0), (0, 1)))[:, counts]
        paid = np.pad(pays.cumsum(1), ((0, 0), (1, 0)))[:, counts]
        left = here.left[:, None] - self.answer.spends[d][cells]
        fall = self.spending.falling(d, here.count)[:, None] * (counts < here.count[:, None])
        spent = here.spent[:, None] + units[counts] + fall
        cost = here.cost[:, None] + lost
        bound = cost + paid + self.answer.to_come[d][cells, np.maximum(left, 0)]
        least, most = (behind[d] for behind in self._behind)
        most = np.minimum(most, self._level[d, counts])
        good = (counts <= here.count[:, None]) & (left >= 0) & (bound < self.threshold)
        good &= spent + least <= self.spending.total
        if self.spending.all_of_it:
            good &= spent + most >= self.spending.total
        parent, choice = np.nonzero(good)
        return parent, counts[choice], cost[good], left[good], spent[good]
