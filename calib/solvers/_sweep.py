"""A dynamic program over layers whose cells carry the tokens that are still alive.

What a drop costs depends on which tokens are alive, not only on how many, so the usual table of
counts is not enough. Here each cell (count, budget spent so far) remembers the alive sets of the
cheapest way into it. With every count a level and every spending a cell that is exact when all
layers rank alike; otherwise it is a heuristic, and the lower bound says how good.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgeprune.calib.solvers._problem import CHUNK, Floats, Ints, Problem


@dataclass(frozen=True)
class Corridor:
    """Where the schedules of one sweep may run; arrays are indexed by decision d."""

    levels: list[Ints]  # the counts allowed at d
    low: Ints  # [L-1] least r_1 + ... + r_{d+2}
    high: Ints  # [L-1] most
    width: int = 1  # spendings this close share a cell
    max_falls: int | None = None  # at most this many layers where the count falls
    price: float = 0.0  # radians per token and layer, to compare spendings inside a cell
    max_cells: int = 4096
    units: Ints | None = None  # [L, n + 1] what a layer of so many tokens spends; None: the tokens
    falls: Ints | None = None  # [L-1, n + 1] what a fall at d from so many tokens spends beside it

    def spends(self, layer: int, counts: Ints) -> Ints:
        """What a layer (0-based) that so many tokens enter spends."""
        return counts if self.units is None else self.units[layer, counts]

    def falling(self, d: int, counts: Ints) -> Ints:
        """What a fall from so many tokens spends."""
        return np.zeros_like(counts) if self.falls is None else self.falls[d, counts]


@dataclass(frozen=True)
class Cells:
    """The survivors after a decision: one row per cell."""

    paths: Ints  # [K, d+1] counts so far
    cost: Floats  # [K] mean radians lost so far
    alive: Ints  # [K, S, W] indices of alive tokens, padded with dummies
    spent: Ints  # [K] tokens, or units of time, summed over the layers so far
    falls: Ints  # [K] layers so far where the count fell

    @property
    def level(self) -> Ints:
        return self.paths[:, -1]


def sweep(problem: Problem, corridor: Corridor) -> Cells:
    """All cells after the last decision; none if no schedule fits the corridor."""
    zero = np.zeros(1, np.intp)
    first = np.array([problem.first])
    spent = corridor.spends(0, first)
    cells = Cells(first[:, None], np.zeros(1), problem.start[None], spent, zero)
    for d in range(problem.n_decisions):
        if len(cells.cost):
            cells = _decide(problem, corridor, d, cells)
    return cells


def _decide(problem: Problem, corridor: Corridor, d: int, cells: Cells) -> Cells:
    """Extend every cell by every allowed level and keep the cheapest per new cell."""
    alive = np.sort(cells.alive, axis=-1)
    losses = _losses(problem, d, alive)
    level = corridor.levels[d]
    spends, fall = corridor.spends(d + 1, level), level < cells.level[:, None]
    spent = cells.spent[:, None] + spends + corridor.falling(d, cells.level)[:, None] * fall
    falls = cells.falls[:, None] + fall
    allowed = (level <= cells.level[:, None]) & (spent <= corridor.high[d])
    left = problem.n_decisions - 1 - d  # counts never rise, so this cell can spend so much more:
    allowed &= (spent >= corridor.low[d]) & (spent + left * spends >= corridor.low[-1])
    if corridor.max_falls is not None:
        allowed &= falls <= corridor.max_falls
    parent, choice = np.nonzero(allowed)
    spent, falls = spent[allowed], falls[allowed]
    cost = cells.cost[parent] + losses[parent, np.minimum(level[choice], losses.shape[1] - 1)]

    value = cost + corridor.price * spent
    bucket = (spent - corridor.low[d]) // corridor.width
    limited = falls if corridor.max_falls is not None else np.zeros_like(falls)
    best = _cheapest(value, choice, bucket, limited)
    if len(best) > corridor.max_cells:
        best = best[np.argsort(value[best], kind="stable")[: corridor.max_cells]]
    parent, count = parent[best], level[choice[best]]
    paths = np.concatenate([cells.paths[parent], count[:, None]], axis=1)
    after = _survivors(problem, d, alive, parent, count)
    return Cells(paths, cost[best], after, spent[best], falls[best])


def _losses(problem: Problem, d: int, alive: Ints) -> Floats:
    """Mean radians lost when cell k keeps its best r tokens: [K, W+1], r = 0 .. W."""
    n_cells, _, width = alive.shape
    losses = np.zeros((n_cells, width + 1))
    step = max(1, CHUNK // max(1, alive[0].size))
    for i in range(0, n_cells, step):  # in chunks: gathered prices are as large as the alive sets
        losses[i : i + step, :-1] = problem.prices[d].take(alive[i : i + step]).sum(1)
    return losses[:, ::-1].cumsum(1)[:, ::-1] / problem.n_samples


def _cheapest(value: Floats, *key: Ints) -> Ints:
    """Indices of the least value for each distinct key; of equal values the first."""
    order = np.lexsort((value, *key))
    changed = np.zeros(len(order), bool)
    changed[:1] = True
    for part in key:
        changed[1:] |= np.diff(part[order]) != 0
    return order[changed]


def _survivors(problem: Problem, d: int, alive: Ints, parent: Ints, count: Ints) -> Ints:
    """Alive sets of the new cells at the next decision: [K', S, W']."""
    width = int(count.max(initial=0))
    after = np.empty((len(parent), problem.n_samples, width), np.intp)
    step = max(1, CHUNK // max(1, after[:1].size))
    for i in range(0, len(parent), step):
        part = slice(i, i + step)
        kept = np.arange(width) < count[part, None, None]
        rows = np.where(kept, alive[parent[part], :, :width], problem.dummies)
        after[part] = problem.carry[d].take(rows)
    return after
