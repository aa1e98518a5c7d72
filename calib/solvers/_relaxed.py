"""The cheapest counts of a box under multipliers: a dynamic program with the budget in full.

Neighbouring decisions share a count, so their tables (`_pairs`) are a chain, and the best path
through it within the budget is found exactly. Of every cell it is known what a path through it
costs at least: cells that cost more than what is known already hold no better schedule.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgeprune.calib.solvers._pairs import Box, Real, Tokens, first_table, pair_table
from edgeprune.calib.solvers._problem import Floats, Ints

BUCKETS = 600
"""Of what is left of the budget; spending is rounded down to them."""


@dataclass(frozen=True, eq=False)
class Spending:
    """What layers behind the first may spend."""

    units: Ints  # [L-1, n + 1] what each spends that r tokens enter; never falls
    total: int
    all_of_it: bool  # whether schedules spend just so much; else at most
    falls: Ints | None = None  # [L-1, n + 1] what a decision spends beside it where it is given so
    # many tokens and hands fewer on; never falls; None: nothing

    def falling(self, d: int, counts: Ints) -> Ints:
        """What a fall from so many tokens spends."""
        return np.zeros_like(counts) if self.falls is None else self.falls[d, counts]

    def of(self, counts: Ints) -> Ints:
        """What layers spend that so many tokens enter: [L-1] -> [L-1]."""
        spent: Ints = self.units[np.arange(len(self.units)), counts]
        return spent


@dataclass(frozen=True, eq=False)
class Relaxed:
    """A box under multipliers, answered."""

    tokens: Tokens
    box: Box
    tables: list[Floats]  # [C', C] of all decisions
    spends: list[Ints]  # of each cell, buckets beyond the least of its decision
    so_far: list[Floats]  # [C, buckets] least cost up to a decision, of just so much spent
    to_come: list[Floats]  # [C, buckets] least cost behind it, with so much left

    @classmethod
    def answer(
        cls, tokens: Tokens, box: Box, multipliers: Real, spending: Spending
    ) -> Relaxed | None:
        """`multipliers` [L-2, S, n]. None where the box has no schedule within the budget."""
        units = spending.units
        left = spending.total - int(spending.of(box.low).sum())
        if left < 0:
            return None
        bucket = max(1, left // BUCKETS)
        pairs = zip(units, box.starts, strict=True)
        spends = [(own[start] - own[start[0]]) // bucket for own, start in pairs]
        left //= bucket
        unspent = left if not spending.all_of_it else box.unspent(units) // bucket
        if spending.all_of_it and bucket > 1:
            unspent += 1 + len(spends)  # what was rounded down
        decisions, samples, count = tokens.size
        nothing = np.zeros((1, samples, count))
        prices, certain = np.concatenate([nothing, multipliers, nothing]), box.certain(tokens)
        tables = [first_table(tokens, box, prices[1])]
        for d in range(1, decisions):
            tables.append(pair_table(tokens, box, d, prices[d], prices[d + 1], certain))
        falls = _Falls.of(spending, box, count, bucket)
        so_far = _forward(tables, spends, falls, left)
        to_come = _backward(tables, spends, falls, left, unspent)
        return cls(tokens, box, tables, spends, so_far, to_come)

    @property
    def through(self) -> list[Floats]:
        """Of every cell what a path through it costs at least."""
        return [
            (before + after[:, ::-1]).min(1)
            for before, after in zip(self.so_far, self.to_come, strict=True)
        ]

    @property
    def numbers(self) -> float:
        """That were computed, about."""
        _, samples, count = self.tokens.size
        tables = sum(table.size for table in self.tables)
        return float(tables * (samples * count / 2 + 2 * self.so_far[0].shape[1]))


@dataclass(frozen=True)
class _Falls:
    """Where a decision surely drops tokens, and what that spends at least."""

    first: Ints  # by cell of X the first cell of X' all of whose counts are above it
    spends: Ints  # by cell of X', buckets

    @classmethod
    def of(cls, spending: Spending, box: Box, count: int, bucket: int) -> list[_Falls]:
        """Of all decisions; the first is given `count` tokens."""
        found, before = list[_Falls](), np.array([count])
        for d, start in enumerate(box.starts):
            last = np.minimum(start + box.width - 1, box.high[d])
            first = np.searchsorted(before, last, side="right")
            found.append(cls(first, spending.falling(d, before) // bucket))
            before = start
        return found

    def later(self, costs: Floats) -> Floats:
        """Costs by cell of X' and spending [C', buckets] where each falls."""
        moved = np.full_like(costs, np.inf)
        for row, spent in enumerate(self.spends.tolist()):
            moved[row, spent:] = costs[row, : max(0, costs.shape[1] - spent)]
        return moved


def _forward(
    tables: list[Floats], spends: list[Ints], falls: list[_Falls], left: int
) -> list[Floats]:
    found = list[Floats]()
    before = np.full((1, left + 1), np.inf)
    before[0, 0] = 0
    for table, spend, fall in zip(tables, spends, falls, strict=True):
        now, fallen = np.full((len(spend), left + 1), np.inf), fall.later(before)
        for cell, cost in enumerate(spend.tolist()):
            if cost <= left:
                first = fall.first[cell]
                ways = np.concatenate([before[:first], fallen[first:]])
                options = ways[:, : left + 1 - cost] + table[:, cell, None]
                now[cell, cost:] = options.min(0)
        found.append(now)
        before = now
    return found


def _backward(
    tables: list[Floats], spends: list[Ints], falls: list[_Falls], left: int, unspent: int
) -> list[Floats]:
    found = [np.full((len(spends[-1]), left + 1), np.inf)]
    found[0][:, : unspent + 1] = 0
    for table, spend, fall in zip(tables[:0:-1], spends[:0:-1], falls[:0:-1], strict=True):
        level, falling = (np.full((len(table), left + 1), np.inf) for _ in range(2))
        for cell, cost in enumerate(spend.tolist()):
            if cost <= left:
                options = table[:, cell, None] + found[0][cell, : left + 1 - cost]
                first = fall.first[cell]
                np.minimum(level[:first, cost:], options[:first], out=level[:first, cost:])
                np.minimum(falling[first:, cost:], options[first:], out=falling[first:, cost:])
        found.insert(0, np.minimum(level, fall.later(falling)))
    return found
