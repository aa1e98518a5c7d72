"""A proven lower bound on the least loss: branch and bound over intervals of the counts.

A box holds an interval for every count. Its bound (`_relaxed`) is climbed in Polyak's steps, and
cells that can hold nothing better than the target are cut off its ends. Where that does not close
it, it is split at the count on which neighbouring decisions disagree most. The box with the least
bound is always next, so the least bound of all open boxes is proven at any time: the search may
stop when it has to.
"""

from __future__ import annotations

import heapq
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from time import monotonic

import numpy as np

from edgeprune.calib.solvers._pairs import Box, Real, Tokens
from edgeprune.calib.solvers._problem import (
    UNHURRIED,
    Floats,
    Goal,
    Ints,
    Problem,
    Progress,
    silent,
)
from edgeprune.calib.solvers._relaxed import Relaxed, Spending

MEMORY = 128_000_000  # numbers in the tables of one answer: 1 GB in float64
MOST_CELLS = 192  # of a count
ROOT_STEPS, STEPS = 48, 16  # of ascent, in the first box and in others
WORK = 2e9  # of a search without a limit of time: counted as if cells were counts
ANSWERS = 4, 100  # of such a search, at least and at most
ROUNDING = 1e-9  # of float64, as a share of the objective: far more than was seen
EXACT = 4  # every so many answers one is in float64, and proves something
INERTIA = 0.7  # of the course of ascent
PATIENCE, SLOWER, LEAST_PACE = 6, 0.7, 0.3  # answers without a better one, until steps are shorter
PATHS = 8  # of which a slope is the mean
SPREAD = 0.1  # how far above the best they are, as a share of what is missing to the target


@dataclass(order=True)
class _Open:
    """A box that may hold something better than the target."""

    bound: float
    number: int
    box: Box = field(compare=False)
    multipliers: Real = field(compare=False)
    disputes: Floats = field(compare=False)  # [L-1] how far decisions disagree on each count
    pace: float = field(default=1.0, compare=False)  # of ascent


class Search:
    """For a bound on all schedules of a budget."""

    def __init__(
        self,
        problem: Problem,
        spending: Spending,
        objective: float,  # of a schedule that is known
        goal: Goal,
        progress: Progress = silent,
    ) -> None:
        self.tokens, self.spending = Tokens.of(problem), spending
        self.objective, self.goal, self.progress = objective, goal, progress
        self.target = objective * (1 - goal.gap)
        self.random = np.random.default_rng(0)
        self.began, self.steps, self.numbers = monotonic(), 0, 0
        decisions, samples, count = self.tokens.size
        self.most = int(np.clip(WORK / (decisions * samples * count**2), *ANSWERS))

    def run(self) -> float:
        """The bound."""
        decisions, samples, count = self.tokens.size
        low, high = np.zeros(decisions, np.intp), np.full(decisions, count, np.intp)
        zero = np.zeros((decisions - 1, samples, count), np.float32)
        waiting = [_Open(0.0, 0, self._box(low, high), zero, np.ones(decisions))]
        depth = 0
        with suppress(KeyboardInterrupt) if self.goal.patient else nullcontext():
            while waiting and not self._over():
                first = waiting[0]  # it stays until its parts have taken its place
                steps = STEPS if depth else ROOT_STEPS
                parts = self._halves(first) if depth else [first]
                found = [self._ascend(part, steps) for part in parts]
                heapq.heappop(waiting)
                for part in filter(None, found):
                    heapq.heappush(waiting, part)
                depth += 1
        proven = min([self.target, *(one.bound for one in waiting)])
        return max(0.0, proven - ROUNDING * self.objective)

    def _over(self) -> bool:
        if self.goal.seconds is None:
            return self.steps >= self.most
        return monotonic() - self.began >= self.goal.seconds

    def _box(self, low: Ints, high: Ints) -> Box:
        """With cells as small as memory allows."""
        decisions, samples, count = self.tokens.size
        room = MEMORY // (3 * decisions * samples * (count + 1))
        most = int(np.clip(room, 8, MOST_CELLS))
        return Box(low, high, max(1, -(-int((high - low).max() + 1) // most)))

    def _halves(self, whole: _Open) -> list[_Open]:
        """Two boxes of which one holds every schedule: counts up to a middle, and from there."""
        low, high = whole.box.low, whole.box.high
        d = int(np.where(high > low, whole.disputes, -1).argmax())
        middle = int(low[d] + high[d]) // 2
        parts = list[_Open]()
        for least, most in ((low[d], middle), (middle + 1, high[d])):
            lower, upper = low.copy(), high.copy()
            lower[: d + 1] = np.maximum(low[: d + 1], least)  # counts never rise
            upper[d:] = np.minimum(high[d:], most)
            if (lower <= upper).all():
                self.numbers += 1
                box = self._box(lower, upper)
                parts.append(
                    _Open(
                        whole.bound,
                        self.numbers,
                        box,
                        whole.multipliers,
                        whole.disputes,
                        whole.pace,
                    )
                )
        return parts

    def _ascend(self, start: _Open, steps: int) -> _Open | None:
        """The box, smaller and with a better bound; None where all in it is above the target."""
        bound, box, at, disputes = start.bound, start.box, start.multipliers, start.disputes
        best, top, stalled, pace = at, -np.inf, 0, start.pace
        course = np.zeros_like(at)
        for step in range(steps):
            exact = step % EXACT == 0
            kind = np.float64 if exact else np.float32
            answer = Relaxed.answer(self.tokens, box, at, self.spending, kind)
            self.steps += 1
            if answer is None:
                return None
            through = answer.through
            value = float(through[-1].min())
            if exact:
                if value >= self.target:
                    return None
                if value > bound:
                    bound, best = value, at
                box = self._trimmed(box, through)
                self.progress("bound", self.objective, bound)
            if self._over() or not at.size:
                break
            top, stalled = (value, 0) if value > top else (top, stalled + 1)
            if stalled > PATIENCE:
                pace, stalled = SLOWER * pace, 0
            slope, mean = self._slope(answer, through, value)
            disputes = np.append(np.abs(slope).sum((1, 2)), 0.0)
            course = slope + INERTIA * course
            length = (
                pace
                * (self.objective - mean)
                * len(at[0])
                / max(1e-9, float((course * course).sum()))
            )
            at = at + np.float32(length) * course
        return _Open(bound, start.number, box, best, disputes, max(pace, LEAST_PACE))

    def _trimmed(self, box: Box, through: list[Floats]) -> Box:
        """Without the cells at the ends that hold nothing below the target."""
        low, high = box.low.copy(), box.high.copy()
        for d, bounds in enumerate(through):
            good = np.flatnonzero(bounds < self.target)
            low[d] = box.starts[d][good[0]]
            high[d] = min(box.cell(d, int(good[-1])).stop - 1, int(high[d]))
        return self._box(low, high)

    def _slope(self, answer: Relaxed, through: list[Floats], value: float) -> tuple[Real, float]:
        """Mean over paths near the best, which are drawn through cells near the best."""
        cells = [(d, cell) for d, bounds in enumerate(through) for cell in range(len(bounds))]
        above = np.concatenate(through) - value
        weight = np.exp(-above / (SPREAD * max(self.target - value, 1e-12)))
        drawn = self.random.choice(len(cells), PATHS, p=weight / weight.sum())
        paths = {tuple(answer.path(*cells[i])) for i in dict.fromkeys(drawn.tolist())}
        slope: Real = np.mean([answer.slope(list(path)) for path in paths], axis=0)
        return slope, float(value + above[drawn].mean())


def certify(
    problem: Problem,
    objective: float,
    goal: Goal = UNHURRIED,
    progress: Progress = silent,
    *,
    all_of_it: bool = True,
) -> float:
    """No schedule of a problem's budget loses less; `objective` is what a known one loses.

    Unless `all_of_it`, the sum may stay below the budget."""
    total = problem.total - problem.first
    spending = Spending(np.arange(problem.first + 1), total, all_of_it)
    return Search(problem, spending, objective, goal, progress).run()
