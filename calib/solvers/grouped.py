"""Schedules whose counts fall only behind layers that have attention to look at.

Layers between two with attention are a group of one count, and the problem is solved group by
group. Solvers that know no groups find a schedule that may fall anywhere: its counts are averaged
in each group, then moves between two groups are tried, in ever smaller steps. The bound is that of
schedules that may fall anywhere then, of which these are some.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, permutations

import numpy as np

from edgeprune.calib.solvers import timed
from edgeprune.calib.solvers._problem import Goal, Ints, Problem, Progress, Solution
from edgeprune.calib.solvers.timed import Times
from edgeprune.errors import SpecError
from edgeprune.spec import floor_cr


def groups_of(layers: int, convolutions: Sequence[int]) -> list[int]:
    """How many layers follow each other with one count: a group ends with a layer that has
    attention, the last one with the last layer."""
    ends = [layer for layer in range(1, layers) if layer not in convolutions]
    return [end - start for start, end in pairwise([0, *ends, layers])]


def decisions_of(layers: int, convolutions: Sequence[int]) -> list[int]:
    """The decisions at which counts may fall: behind every group but the last."""
    ends = np.cumsum(groups_of(layers, convolutions))
    return [int(end) - 1 for end in ends[:-1]]


def spread(levels: Ints, layers: int, convolutions: Sequence[int]) -> Ints:
    """The counts of all layers from those of their groups."""
    return np.repeat(levels, groups_of(layers, convolutions))


def solve(
    problem: Problem,
    convolutions: Sequence[int],
    max_falls: int | None,
    goal: Goal,
    progress: Progress,
) -> Solution:
    """A schedule of a budget of tokens that falls only where it may, at most so often; its sum may
    stay below the budget by less than L. The bound is about all that fall only where they may."""
    sizes = _sizes(problem, convolutions)
    own = problem.falling_at(decisions_of(int(sizes.sum()), convolutions))
    units = np.outer(sizes, np.arange(problem.first + 1))
    times = Times(units, np.zeros_like(units[1:]))
    found = timed.solve(own, times, times, problem.total, goal, progress, max_falls)
    assert found is not None  # `_sizes` says so
    fill = _raised if max_falls is None else _filled
    levels = fill(problem, found.counts, sizes)
    loss = float(own.evaluate(levels[None])[0])
    return Solution(np.repeat(levels, sizes), loss, min(loss, found.bound))


def settle(problem: Problem, solution: Solution, convolutions: Sequence[int]) -> Solution:
    """A schedule near another one that falls only where it may; its sum may stay below the budget
    by less than L. SpecError where the first group leaves too few tokens for the others."""
    counts, sizes = solution.counts, _sizes(problem, convolutions)
    starts = np.concatenate([[0], sizes.cumsum()[:-1]])
    levels = np.maximum(1, np.add.reduceat(counts, starts) // sizes)
    levels[0] = problem.first
    levels = _within(problem, levels, sizes)
    loss = float(problem.evaluate(np.repeat(levels[None], sizes, 1))[0])
    step = max(1, int(levels[1:].max(initial=1)) // 2)
    while step:
        near = _moved(problem, levels, sizes, step)
        found = problem.evaluate(np.repeat(near, sizes, 1)) if len(near) else np.zeros(0)
        if len(near) and found.min() < loss * (1 - 1e-9):
            levels, loss = near[found.argmin()], float(found.min())
        else:
            step //= 2
    return Solution(np.repeat(levels, sizes), loss, min(loss, solution.bound))


def _sizes(problem: Problem, convolutions: Sequence[int]) -> Ints:
    """Layers of each group; SpecError where the first leaves too few tokens for the others."""
    layers = problem.n_decisions + 1
    sizes = np.array(groups_of(layers, convolutions), np.intp)
    least = sizes[0] * problem.first + (layers - sizes[0])
    if least > problem.total:
        most = floor_cr(problem.first, layers, int(least))
        raise SpecError(
            f"all visual tokens stay up to layer {sizes[0]}, the first of {layers} that has"
            f" attention to look at, so --cr is at most {most:g}; choose a method that prunes"
            " before the decoder, such as fastervlm"
        )
    return sizes


def _filled(problem: Problem, levels: Ints, sizes: Ints) -> Ints:
    """All levels below the first raised together, as long as the budget allows it."""
    while (lower := levels < problem.first).any():
        raised = levels + lower
        if (raised * sizes).sum() > problem.total:
            break
        levels = raised
    return levels


def _within(problem: Problem, levels: Ints, sizes: Ints) -> Ints:
    """Levels lowered to the budget, the largest behind the first first, then raised up to it."""
    levels = levels.copy()
    while (levels * sizes).sum() > problem.total:
        last = np.flatnonzero(levels == levels[1:].max())[-1]  # the order stays
        levels[last] -= 1
    return _raised(problem, levels, sizes)


def _raised(problem: Problem, levels: Ints, sizes: Ints) -> Ints:
    """Levels raised by one each, the earliest first, as long as the budget allows it."""
    levels = levels.copy()
    for group in range(1, len(levels)):
        room = (problem.total - (levels * sizes).sum()) // sizes[group]
        levels[group] = min(levels[group - 1], levels[group] + max(0, room))
    return levels


def _moved(problem: Problem, levels: Ints, sizes: Ints, step: int) -> Ints:
    """Levels of which one is `step` lower, and another as much higher as that allows: [C, G]."""
    found = list[Ints]()
    for low, high in permutations(range(1, len(levels)), 2):
        moved = levels.copy()
        moved[low] -= step
        moved[high] += (problem.total - (moved * sizes).sum()) // sizes[high]
        moved[high] = min(moved[high], problem.first)
        if moved[low] >= 1 and (np.diff(moved) <= 0).all():
            found.append(_raised(problem, moved, sizes))
    return np.array(found, np.intp).reshape(-1, len(levels))
