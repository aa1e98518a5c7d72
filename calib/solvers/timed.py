"""Schedules under a budget of time in place of a count of tokens: any table of times, steps too.

Time is counted in whole units. Layers between two places where the count may fall are a group:
they have one count, and a table of times by that count. Where the count falls, choosing takes more,
by the tokens that are alive there. One sweep gives the whole frontier of loss against time; sweeps
with prices, and corridors around the best, give the schedule of one budget. The lower bound counts
time rounded down.

Where r_1 is open (`Problem.pose_open`), the n tokens that the encoder gives stand for a group that
takes no time, and are left out of the answer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from edgeprune.calib.solvers._certificate import Search
from edgeprune.calib.solvers._problem import (
    UNHURRIED,
    Goal,
    Ints,
    Problem,
    Progress,
    Solution,
    silent,
)
from edgeprune.calib.solvers._relaxed import Spending
from edgeprune.calib.solvers._sweep import Cells, Corridor, sweep

MEMORY = 16_000_000  # token indices in the cells of one sweep: 128 MB
FEW_LEVELS = 37  # of a coarse sweep
BUCKETS = 64  # of spending, in a sweep
PRICES = (0.0, 0.3, 1.0, 3.0)  # of a unit of time, times the mean price of a token
REACH = 6  # a corridor is this many steps wide to each side


@dataclass(frozen=True)
class Times:
    """What G groups of layers take, in whole units that never fall as tokens become more."""

    units: Ints  # [G, n + 1] of a group that r tokens enter
    falls: Ints  # [G - 1, n + 1] beside it behind a group of r tokens, where fewer go on

    def of(self, counts: Ints) -> Ints:
        """Of schedules [C, G]: [C]."""
        before, groups = counts[:, :-1], np.arange(len(self.units))
        chosen = np.where(np.diff(counts, axis=1) < 0, self.falls[groups[:-1], before], 0)
        spent: Ints = self.units[groups, counts].sum(1) + chosen.sum(1)
        return spent

    def levels(self, group: int, most: int) -> Ints:
        """Counts of which one more takes longer, and 0 and `most`: of equally long ones the
        largest."""
        rises = np.flatnonzero(np.diff(self.units[group, : most + 1]) > 0)
        return np.unique(np.concatenate([[0], rises, [most]])).astype(np.intp)

    def fastest(self, enter: int) -> Ints:
        """Counts [G] that take the least time where so many tokens, or more, enter group 1: never
        more, since no group takes less with more, and none from some group on."""
        paths = enter * np.tri(len(self.units), dtype=np.intp)  # row g: g + 1 groups are entered
        best: Ints = paths[self.of(paths).argmin()]
        return best

    def of_problem(self, problem: Problem) -> Times:
        """Of the counts that a problem has: what the encoder gives takes no time."""
        units, falls = (x[:, : problem.first + 1] for x in (self.units, self.falls))
        if problem.least is None:
            return Times(units, falls)
        free = np.zeros_like(units[:1])
        return Times(np.concatenate([free, units]), np.concatenate([free, falls]))


def frontier(problem: Problem, times: Times) -> list[tuple[int, float, Ints]]:
    """Schedules of which none is both faster and better than another: time, loss and counts, the
    fastest first. A sweep holds so many cells; without a price on time the fast ones are let go."""
    times = times.of_problem(problem)
    most = int(times.units[:, problem.first].sum())
    mean = float(problem.prices.sum()) / problem.n_samples / max(1, most)
    cells = [sweep(problem, _coarse(problem, times, most, price * mean)) for price in PRICES]
    spent, cost = (np.concatenate(x) for x in ([c.spent for c in cells], [c.cost for c in cells]))
    paths = np.concatenate([c.paths for c in cells])
    best, kept = np.inf, list[tuple[int, float, Ints]]()
    for index in np.lexsort((cost, spent)):
        if cost[index] < best - 1e-12:
            best = float(cost[index])
            kept.append((int(spent[index]), best, _entered(problem, paths[index])))
    return kept


def solve(
    problem: Problem,
    times: Times,
    floor: Times,
    budget: int,
    goal: Goal = UNHURRIED,
    progress: Progress = silent,
    max_falls: int | None = None,
    known: Ints | None = None,
) -> Solution | None:
    """A good schedule of at most `budget` units with a proven bound; None where there is none.

    The bound is about all schedules that fit by `floor`, which is never above `times`, however
    often they fall. `max_falls` is how often the one that is found may. `known` [G] are counts to
    begin with, if they fit: a coarse sweep alone may miss the only ones that a tight budget allows.
    """
    times, floor = times.of_problem(problem), floor.of_problem(problem)
    first: tuple[float, Ints] | None = None
    if known is not None:
        path = known if problem.least is None else np.append(problem.first, known)
        alone = [path[d : d + 1] for d in range(1, len(path))]
        one = _corridor(problem, times, budget, alone, 0.0, BUCKETS)
        first = _better(first, sweep(problem, replace(one, max_falls=max_falls)))
    mean = float(problem.prices.sum()) / problem.n_samples / max(1, budget)
    for price in PRICES:
        coarse = _coarse(problem, times, budget, price * mean)
        first = _better(first, sweep(problem, replace(coarse, max_falls=max_falls)))
    if first is None:
        return None
    best = first
    step = 1 << max(0, (problem.first // 16).bit_length() - 1)
    while step:
        progress(f"polish in steps of {step}", best[0], 0.0)
        while True:
            near = _around(problem, times, budget, best[1], step)
            found = _better(best, sweep(problem, replace(near, max_falls=max_falls)))
            if found is None or not found[0] < best[0] * (1 - 1e-9):
                break
            best = found
        step //= 2
    left = budget - int(floor.units[0, problem.first])
    spending = Spending(floor.units[1:], left, False, floor.falls)
    bound = Search(problem, spending, best[0], goal, progress).run()
    return Solution(_entered(problem, best[1]), best[0], min(best[0], bound))


def _entered(problem: Problem, counts: Ints) -> Ints:
    """The counts of all groups in a schedule of the problem."""
    return counts if problem.least is None else counts[1:]


def _better(best: tuple[float, Ints] | None, cells: Cells) -> tuple[float, Ints] | None:
    if not len(cells.cost) or (best is not None and cells.cost.min() >= best[0]):
        return best
    index = int(cells.cost.argmin())
    return float(cells.cost[index]), cells.paths[index]


def _coarse(problem: Problem, times: Times, budget: int, price: float) -> Corridor:
    """All layers, all times: every count of a small problem, else few levels, denser where the
    count is small, each the largest count that takes no longer."""
    levels = [np.arange(problem.first + 1)] * problem.n_decisions
    if problem.first >= FEW_LEVELS:
        curve = np.rint(np.linspace(0, 1, FEW_LEVELS) ** 2 * problem.first)
        every = (times.levels(d + 1, problem.first) for d in range(problem.n_decisions))
        levels = [np.unique(some[np.searchsorted(some, curve)]) for some in every]
    return _corridor(problem, times, budget, levels, price, BUCKETS)


def _around(problem: Problem, times: Times, budget: int, counts: Ints, step: int) -> Corridor:
    """Counts within REACH steps of a schedule, the largest that take no longer than these, and the
    counts of both neighbours.

    Keeping fewer may lose nothing: a token that one layer ranks last may be another's first.
    """
    offsets, levels = step * np.arange(-REACH, REACH + 1), list[Ints]()
    around = np.pad(counts, (0, 1), mode="edge")
    for group, count in enumerate(counts[1:], 1):
        near = np.clip(count + offsets, 0, problem.first)
        near = np.concatenate([near, around[group - 1 : group + 2]])
        every = times.levels(group, problem.first)
        snapped = every[np.searchsorted(every, near)]
        levels.append(np.unique(np.concatenate([near, snapped])))
    return _corridor(problem, times, budget, levels, 0.0, 4 * BUCKETS)


def _corridor(
    problem: Problem, times: Times, budget: int, levels: list[Ints], price: float, buckets: int
) -> Corridor:
    """What is spent at a decision leaves enough for the cheapest layers behind it."""
    n, least = problem.n_decisions, times.units[1:, 0]
    if problem.least is not None:
        levels = [levels[0][levels[0] >= problem.least], *levels[1:]]
    high = budget - (least.sum() - least.cumsum())
    room = int(np.clip(MEMORY // problem.start.size, 64, 4096))
    return Corridor(
        levels,
        np.zeros(n, np.intp),
        high,
        max(1, budget // buckets),
        price=price,
        max_cells=room,
        units=times.units,
        falls=times.falls,
    )
