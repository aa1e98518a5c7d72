"""The cheapest counts of a box under multipliers: a dynamic program with the budget in full.

Neighbouring decisions share a count, so their tables (`_pairs`) are a chain, and the best path
through it within the budget is found exactly. Of every cell it is known what a path through it
costs at least: cells that cost more than what is known already hold no better schedule.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgeprune.calib.solvers._pairs import Box, Kind, Pair, Real, Tokens, first_table, pair
from edgeprune.calib.solvers._problem import Floats, Ints

BUCKETS = 600
"""Of what is left of the budget; spending is rounded down to them."""


@dataclass(frozen=True, eq=False)
class Spending:
    """What layers behind the first may spend: a layer that r tokens enter spends `units[r]`."""

    units: Ints  # [n + 1], never falls
    total: int
    all_of_it: bool  # whether schedules spend just so much; else at most


@dataclass(frozen=True, eq=False)
class Relaxed:
    """A box under multipliers, answered."""

    tokens: Tokens
    box: Box
    pairs: list[Pair]  # of decisions 1 .. L-2
    tables: list[Floats]  # [C', C] of all decisions
    spends: list[Ints]  # of each cell, buckets beyond the least of its decision
    so_far: list[Floats]  # [C, buckets] least cost up to a decision, of just so much spent
    to_come: list[Floats]  # [C, buckets] least cost behind it, with so much left

    @classmethod
    def answer(
        cls, tokens: Tokens, box: Box, multipliers: Real, spending: Spending, kind: Kind
    ) -> Relaxed | None:
        """`multipliers` [L-2, S, n]. None where the box has no schedule within the budget."""
        units = spending.units
        left = spending.total - int(units[box.low].sum())
        if left < 0:
            return None
        bucket = max(1, left // BUCKETS)
        spends = [(units[start] - units[start[0]]) // bucket for start in box.starts]
        left //= bucket
        unspent = left if not spending.all_of_it else box.unspent(units) // bucket
        if spending.all_of_it and bucket > 1:
            unspent += 1 + len(spends)  # what was rounded down
        decisions, samples, count = tokens.size
        nothing = np.zeros((1, samples, count))
        prices, certain = np.concatenate([nothing, multipliers, nothing]), box.certain(tokens)
        pairs = [
            pair(tokens, box, d, prices[d], prices[d + 1], certain, kind)
            for d in range(1, decisions)
        ]
        tables = [first_table(tokens, box, prices[1]), *(one.table for one in pairs)]
        so_far = _forward(tables, spends, left)
        return cls(
            tokens, box, pairs, tables, spends, so_far, _backward(tables, spends, left, unspent)
        )

    @property
    def through(self) -> list[Floats]:
        """Of every cell what a path through it costs at least."""
        return [
            (before + after[:, ::-1]).min(1)
            for before, after in zip(self.so_far, self.to_come, strict=True)
        ]

    def path(self, d: int, cell: int) -> list[int]:
        """The cells of the cheapest path through one."""
        spent = int((self.so_far[d][cell] + self.to_come[d][cell, ::-1]).argmin())
        left = self.so_far[d].shape[1] - 1 - spent
        cells = [cell]
        for e in range(d, 0, -1):
            spent -= int(self.spends[e][cells[0]])
            cells.insert(
                0, int((self.so_far[e - 1][:, spent] + self.tables[e][:, cells[0]]).argmin())
            )
        for e in range(d + 1, len(self.tables)):
            rest = left - self.spends[e]
            costs = (
                self.to_come[e][np.arange(len(rest)), np.maximum(rest, 0)]
                + self.tables[e][cells[-1]]
            )
            cells.append(int(np.where(rest >= 0, costs, np.inf).argmin()))
            left = int(rest[cells[-1]])
        return cells

    def slope(self, cells: list[int]) -> Real:
        """Of a path: what one decision hands over and the next does not take, [L-2, S, n]."""
        decisions, samples, count = self.tokens.size
        slope: Real = np.zeros((decisions - 1, samples, count), np.float32)
        first = self.box.cell(0, cells[0])
        slope[0] += self.tokens.rank[0] < min(first.stop - 1, int(self.box.high[0]))
        for d, one in enumerate(self.pairs, 1):
            taken, kept = one.chosen(self.box, d, cells[d - 1], cells[d])
            slope[d - 1] -= taken
            if d < decisions - 1:
                slope[d] += kept
        return slope


def _forward(tables: list[Floats], spends: list[Ints], left: int) -> list[Floats]:
    found = list[Floats]()
    before = np.full((1, left + 1), np.inf)
    before[0, 0] = 0
    for table, spend in zip(tables, spends, strict=True):
        now = np.full((len(spend), left + 1), np.inf)
        for cell, cost in enumerate(spend.tolist()):
            if cost <= left:
                options = before[:, : left + 1 - cost] + table[:, cell, None]
                now[cell, cost:] = options.min(0)
        found.append(now)
        before = now
    return found


def _backward(tables: list[Floats], spends: list[Ints], left: int, unspent: int) -> list[Floats]:
    found = [np.full((len(spends[-1]), left + 1), np.inf)]
    found[0][:, : unspent + 1] = 0
    for table, spend in zip(tables[:0:-1], spends[:0:-1], strict=True):
        now = np.full((len(table), left + 1), np.inf)
        for cell, cost in enumerate(spend.tolist()):
            if cost <= left:
                options = table[:, cell, None] + found[0][cell, : left + 1 - cost]
                np.minimum(now[:, cost:], options, out=now[:, cost:])
        found.insert(0, now)
    return found
