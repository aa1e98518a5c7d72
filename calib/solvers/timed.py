"""Schedules under a budget of time in place of a count of tokens: any table of times, steps too.

Time is counted in whole units: a layer that r tokens enter takes `units[r]`, a layer where the
count falls `fall` more. One sweep gives the whole frontier of loss against time; sweeps with
prices, and corridors around the best, give the schedule of one budget. The lower bound counts time
rounded down, and no falls.

Where r_1 is open (`Problem.pose_open`), the n tokens that the encoder gives stand for a layer that
takes no time: it is added to the budget, and left out of the answer.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    """What layers take, in whole units; `units` [n + 1] never falls."""

    units: Ints  # of a layer that r tokens enter
    fall: int = 0  # more, where the count falls

    def of(self, counts: Ints) -> Ints:
        """Of schedules [C, L]: [C]."""
        falls = (np.diff(counts, axis=1) < 0).sum(1)
        spent: Ints = self.units[counts].sum(1) + self.fall * falls
        return spent

    def among(self, tokens: int) -> Times:
        """Of layers that no more than so many tokens enter."""
        return Times(self.units[: tokens + 1], self.fall)

    @property
    def levels(self) -> Ints:
        """Counts of which one more takes longer, and 0 and n: of equally long ones the largest."""
        last = len(self.units) - 1
        rises = np.flatnonzero(np.diff(self.units) > 0)
        return np.unique(np.concatenate([[0], rises, [last]])).astype(np.intp)


def frontier(problem: Problem, times: Times) -> list[tuple[int, float, Ints]]:
    """Schedules of which none is both faster and better than another: time, loss and counts, the
    fastest first. A sweep holds so many cells; without a price on time the fast ones are let go."""
    times, free = times.among(problem.first), _free(problem, times)
    most = int(times.units[problem.first]) * (problem.n_decisions + 1)
    mean = float(problem.prices.sum()) / problem.n_samples / max(1, most)
    cells = [sweep(problem, _coarse(problem, times, most, price * mean)) for price in PRICES]
    spent, cost = (np.concatenate(x) for x in ([c.spent for c in cells], [c.cost for c in cells]))
    paths = np.concatenate([c.paths for c in cells])
    best, kept = np.inf, list[tuple[int, float, Ints]]()
    for index in np.lexsort((cost, spent)):
        if cost[index] < best - 1e-12:
            best = float(cost[index])
            kept.append((int(spent[index]) - free, best, _entered(problem, paths[index])))
    return kept


def solve(
    problem: Problem,
    times: Times,
    floor: Times,
    budget: int,
    goal: Goal = UNHURRIED,
    progress: Progress = silent,
) -> Solution | None:
    """A good schedule of at most `budget` units with a proven bound; None where there is none.

    The bound is about all schedules that fit by `floor`, which is never above `times`.
    """
    times, floor = times.among(problem.first), floor.among(problem.first)
    budget += _free(problem, times)
    first: tuple[float, Ints] | None = None
    mean = float(problem.prices.sum()) / problem.n_samples / max(1, budget)
    for price in PRICES:
        first = _better(first, sweep(problem, _coarse(problem, times, budget, price * mean)))
    if first is None:
        return None
    best = first
    step = 1 << max(0, (problem.first // 16).bit_length() - 1)
    while step:
        progress(f"polish in steps of {step}", best[0], 0.0)
        while True:
            found = _better(best, sweep(problem, _around(problem, times, budget, best[1], step)))
            if found is None or not found[0] < best[0] * (1 - 1e-9):
                break
            best = found
        step //= 2
    left = budget - int(floor.units[problem.first])
    bound = Search(problem, Spending(floor.units, left, False), best[0], goal, progress).run()
    return Solution(_entered(problem, best[1]), best[0], min(best[0], bound))


def _free(problem: Problem, times: Times) -> int:
    """Units that a schedule of the problem spends and no layer takes."""
    return 0 if problem.least is None else int(times.units[problem.first])


def _entered(problem: Problem, counts: Ints) -> Ints:
    """r_1 .. r_L of a schedule of the problem."""
    return counts if problem.least is None else counts[1:]


def _better(best: tuple[float, Ints] | None, cells: Cells) -> tuple[float, Ints] | None:
    if not len(cells.cost) or (best is not None and cells.cost.min() >= best[0]):
        return best
    index = int(cells.cost.argmin())
    return float(cells.cost[index]), cells.paths[index]


def _coarse(problem: Problem, times: Times, budget: int, price: float) -> Corridor:
    """All layers, all times: every count of a small problem, else few levels, denser where the
    count is small, each the largest count that takes no longer."""
    levels = np.arange(problem.first + 1)
    if len(levels) > FEW_LEVELS:
        curve = np.rint(np.linspace(0, 1, FEW_LEVELS) ** 2 * problem.first)
        levels = np.unique(times.levels[np.searchsorted(times.levels, curve)])
    return _corridor(problem, times, budget, [levels] * problem.n_decisions, price, BUCKETS)


def _around(problem: Problem, times: Times, budget: int, counts: Ints, step: int) -> Corridor:
    """Counts within REACH steps of a schedule, and the largest that take no longer than these.

    Fewer may be better for nothing: a token that one layer ranks last may be another's first.
    """
    offsets, levels = step * np.arange(-REACH, REACH + 1), list[Ints]()
    for count in counts[1:]:
        near = np.clip(count + offsets, 0, problem.first)
        snapped = times.levels[np.searchsorted(times.levels, near)]
        levels.append(np.unique(np.concatenate([near, snapped])))
    return _corridor(problem, times, budget, levels, 0.0, 4 * BUCKETS)


def _corridor(
    problem: Problem, times: Times, budget: int, levels: list[Ints], price: float, buckets: int
) -> Corridor:
    """What is spent at a decision leaves enough for the cheapest layers behind it."""
    n, least = problem.n_decisions, int(times.units[0])
    if problem.least is not None:
        levels = [levels[0][levels[0] >= problem.least], *levels[1:]]
    high = budget - least * np.arange(n - 1, -1, -1)
    room = int(np.clip(MEMORY // problem.start.size, 64, 4096))
    return Corridor(
        levels,
        np.zeros(n, np.intp),
        high,
        max(1, budget // buckets),
        price=price,
        max_cells=room,
        units=times.units,
        fall=times.fall,
    )
