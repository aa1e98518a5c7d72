"""One schedule for all samples at once: a coarse sweep, then ever finer corridors around the best.

A corridor allows every layer a few counts beside the current one and lets the budget stray for a
while, so a sweep through it tries all combinations of small moves, not one exchange at a time.
"""

from __future__ import annotations

from time import monotonic

import numpy as np

from edgeprune.calib.solvers._bound import simple_bound
from edgeprune.calib.solvers._certificate import certify
from edgeprune.calib.solvers._problem import (
    UNHURRIED,
    Floats,
    Goal,
    Ints,
    Problem,
    Progress,
    Solution,
    round_to_sum,
    silent,
)
from edgeprune.calib.solvers._sweep import Cells, Corridor, sweep

MEMORY = 16_000_000  # token indices in the cells of one sweep: 128 MB
MOST_CELLS = 4096
FEW_LEVELS = 37  # of the coarse sweep, when there is no room for all counts
STARTS = 4  # schedules taken from the coarse sweep; half survive each step of polishing
REACH = 6  # a corridor is this many steps wide to each side
STRAY = 16  # and its spending strays this many steps from the current one


def solve(
    problem: Problem,
    *,
    max_falls: int | None = None,
    goal: Goal = UNHURRIED,
    progress: Progress = silent,
) -> Solution:
    """A good schedule with a proven bound, which is about schedules of just this sum, or with
    `max_falls` of at most this sum."""
    counts, objective = search(problem, max_falls, goal.seconds, progress)
    bound = certify(problem, objective, goal, progress, all_of_it=max_falls is None)
    return Solution(counts, objective, min(objective, bound))


def search(
    problem: Problem,
    max_falls: int | None = None,
    time_limit: float | None = None,
    progress: Progress = silent,
) -> tuple[Ints, float]:
    """The best schedule found and its objective; without `max_falls` the sum is exactly `total`.

    With it the sum may stay below `total`, by less than L: few plateaus cannot always hit it.
    """
    deadline = np.inf if time_limit is None else monotonic() + time_limit
    _, price = simple_bound(problem)
    pool = _starts(problem, sweep(problem, _coarse(problem, price, max_falls)), max_falls)
    objective = problem.evaluate(pool)
    step, keep = 1 << max(0, (problem.first // 16).bit_length() - 1), STARTS
    while step:
        best = np.argsort(objective, kind="stable")[:keep]
        progress(f"polish in steps of {step}", float(objective[best[0]]), 0.0)
        pool = np.unique(
            [_polish(problem, pool[k], step, price, max_falls, deadline) for k in best], axis=0
        )
        objective = problem.evaluate(pool)
        step, keep = step // 2, max(1, keep // 2)
    winner = int(objective.argmin())
    return pool[winner], float(objective[winner])


def _polish(
    problem: Problem, counts: Ints, step: int, price: float, max_falls: int | None, deadline: float
) -> Ints:
    """Sweep corridors around the best schedule so far until one brings nothing."""
    objective = float(problem.evaluate(counts[None])[0])
    while monotonic() < deadline:
        found = sweep(problem, _around(problem, counts, step, price, max_falls))
        if not found.cost.min(initial=np.inf) < objective * (1 - 1e-9):  # false at 0, too
            break
        counts, objective = found.paths[found.cost.argmin()], float(found.cost.min())
    return counts


def _coarse(problem: Problem, price: float, max_falls: int | None) -> Corridor:
    """All layers, all budgets: every count where that fits, else few, denser where r is small."""
    first, n = problem.first, problem.n_decisions
    room = int(np.clip(MEMORY // problem.start.size, 64, MOST_CELLS))
    levels = np.arange(first + 1)
    if room < 32 * len(levels):
        curve = np.linspace(0, 1, min(FEW_LEVELS, len(levels))) ** 2
        levels = np.unique(np.rint(first * curve).astype(np.intp))
    width = max(1, (problem.total - first) // int(np.clip(room // len(levels), 8, 64)))
    low, high = np.zeros(n, np.intp), np.full(n, problem.total + 2 * width)
    low[-1] = problem.total - 2 * width
    return Corridor([levels] * n, low, high, width, max_falls, price, room)


def _around(
    problem: Problem, counts: Ints, step: int, price: float, max_falls: int | None
) -> Corridor:
    """Counts within REACH steps of a schedule, spendings within STRAY, the same sum at the end."""
    room = int(np.clip(MEMORY // problem.start.size, 64, MOST_CELLS))
    reach, stray, width, near = REACH, STRAY * step, 1, counts[None, 1:]
    if max_falls is not None:  # whole plateaus move, and their ends onto a neighbour's level
        padded = np.pad(counts, (0, 1), mode="edge")
        near = np.stack([padded[:-2], padded[1:-1], padded[2:]])
        reach, stray = REACH // 2, step * len(counts)
        width = max(1, stray // STRAY)
    offsets = step * np.arange(-reach, reach + 1)
    levels = [np.unique(np.clip(c[:, None] + offsets, 0, problem.first)) for c in near.T]
    spent = counts.cumsum()[1:]
    low, high = spent - stray, spent + stray
    low[-1] = high[-1] = problem.total
    if max_falls is not None:
        low[-1] -= problem.n_decisions
    return Corridor(levels, low, high, width, max_falls, price, room)


def _starts(problem: Problem, cells: Cells, max_falls: int | None) -> Ints:
    """Schedules that keep to the budget, made from a coarse sweep that need not: [K, L]."""
    first, total = problem.first, problem.total
    if max_falls is not None:
        level = (total - first) // problem.n_decisions  # always fits: one fall
        even = np.array([first] + [level] * problem.n_decisions)
        best = cells.paths[cells.spent <= total][np.argsort(cells.cost[cells.spent <= total])]
        return np.stack([_filled(problem, counts) for counts in (*best[:STARTS], even)])
    shares = np.full((1, problem.n_decisions + 1), (total - first) / problem.n_decisions)
    shares[:, 0] = first
    mixed = np.concatenate([_mixed(cells, total), shares])
    return np.unique([round_to_sum(row, total) for row in mixed], axis=0)


def _mixed(cells: Cells, total: int) -> Floats:
    """Blends of one schedule below the budget and one above that meet it exactly: [K, L].

    A blend of schedules that never rise never rises; those with the least blended cost are taken.
    """
    over = cells.spent >= total
    below, above = np.flatnonzero(~over)[:, None], np.flatnonzero(over)
    if not (below.size and above.size):
        exact: Floats = cells.paths[cells.spent == total][:STARTS].astype(np.float64)
        return exact
    gap = cells.spent[above] - cells.spent[below]
    share = (total - cells.spent[below]) / gap  # of the schedule above
    cost = share * cells.cost[above] + (1 - share) * cells.cost[below]
    best = np.argsort(cost, axis=None, kind="stable")[:STARTS]
    row, column = np.unravel_index(best, cost.shape)
    weight = share[row, column][:, None]
    blends: Floats = weight * cells.paths[above[column]]
    blends += (1 - weight) * cells.paths[below[row, 0]]
    return blends


def _filled(problem: Problem, counts: Ints) -> Ints:
    """Raise all counts below r_1 together until one more would break the budget."""
    while (lower := counts < problem.first).any() and counts.sum() + lower.sum() <= problem.total:
        counts = counts + lower
    return counts
