"""A proven lower bound on the least loss: branch and bound over intervals of the counts.

A box holds an interval for every count. Multipliers are found for it (`_climb`), with which its
bound is computed (`_relaxed`); counts at its ends that can hold nothing better than the target are
cut off. Where that does not close it, all schedules are walked through whose first layers do not
exceed the target by themselves (`_prefixes`), and where these are too many, it is split. The box
with the least bound is always next, so the least bound of all open boxes is proven at any time: the
search may stop when it has to.
"""

from __future__ import annotations

import heapq
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from time import monotonic

import numpy as np

from edgeprune.calib.solvers._climb import Start, climb
from edgeprune.calib.solvers._pairs import Box, Tokens
from edgeprune.calib.solvers._prefixes import Walk
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

MOST_CELLS = 192
"""Of a count: more counts than these share cells."""
FIRST_STEPS, STEPS = 400, 60
"""Of climbing, in the first box and in others."""
TRIMS = 3
"""Times that a box is bounded anew after counts were cut off."""
ANSWER = 4e9
"""Numbers in the tables of an answer, about."""
WORK = 8e9
"""Numbers that a search without a limit of time computes."""
CLIMB, INDEX = 40, 8
"""Numbers that take as long as a multiplier in a step of a climb, and a token index of a walk."""
WALK = 2.0
"""Work of the walks through a box, beside what its multipliers and tables took."""
SHARES = 0.2, 0.5, 0.8, 1.0
"""Of the way from a box's bound to the target: thresholds of its walks."""
ROUNDING = 1e-9
"""Of float64, as a share of the objective: far more than was seen."""


@dataclass(order=True)
class _Open:
    """A box that may hold something better than the target."""

    bound: float
    number: int
    box: Box = field(compare=False)
    start: Start = field(compare=False)


class Search:
    """The search for a lower bound on the loss of all schedules of a budget."""

    def __init__(
        self,
        problem: Problem,
        spending: Spending,
        objective: float,  # of a schedule that is known
        goal: Goal,
        progress: Progress = silent,
    ) -> None:
        self.problem, self.tokens, self.spending = problem, Tokens.of(problem), spending
        self.objective, self.goal, self.progress = objective, goal, progress
        self.target = objective * (1 - goal.gap)
        self.began, self.work, self.boxes = monotonic(), 0.0, 0
        most = float(spending.units[:, -1].mean())
        self.budget = max(1.0, spending.total * self.tokens.size[2] / max(1.0, most))  # tokens

    def run(self) -> float:
        """The bound."""
        if self.target <= 0:
            return 0.0
        start = Start.of(self.tokens, self.objective / self.budget)
        waiting = [_Open(0.0, 0, self._whole(), start)]
        parts, steps = waiting[:], self._first_steps(start)
        with suppress(KeyboardInterrupt) if self.goal.patient else nullcontext():
            while waiting and not self._over():
                found = [self._improved(part, steps) for part in parts]
                heapq.heappop(waiting)  # their whole, which has stayed until now
                for part in filter(None, found):
                    heapq.heappush(waiting, part)
                parts, steps = self._halves(waiting[0]) if waiting else [], STEPS
        proven = min([self.target, *(one.bound for one in waiting)])
        return max(0.0, proven - ROUNDING * self.objective)

    def _first_steps(self, start: Start) -> int:
        """Fewer where the work is limited and each step is long."""
        if self.goal.seconds is not None:
            return FIRST_STEPS
        return int(np.clip(2 * WORK / (CLIMB * (start.tokens.size + 1)), 20, FIRST_STEPS))

    def _over(self) -> bool:
        if self.goal.seconds is None:
            return self.work >= WORK
        return monotonic() - self.began >= self.goal.seconds

    def _whole(self) -> Box:
        """All counts that the budget allows."""
        decisions, units = self.tokens.size[0], self.spending.units
        least = units[:, 0]
        left = self.spending.total - (least.sum() - least.cumsum())  # for the layers so far
        so_far = zip(units.cumsum(0), left, strict=True)
        high = np.array([np.searchsorted(spent, most, side="right") - 1 for spent, most in so_far])
        return self._box(np.zeros(decisions, np.intp), np.maximum(high, 0))

    def _box(self, low: Ints, high: Ints) -> Box:
        decisions, samples, count = self.tokens.size
        cells = int(np.clip(np.sqrt(ANSWER / (decisions * samples * count)), 8, MOST_CELLS))
        return Box(low, high, max(1, -(-int((high - low).max() + 1) // cells)))

    def _halves(self, whole: _Open) -> list[_Open]:
        """Two boxes of which one holds every schedule: counts up to a middle, and from there."""
        low, high = whole.box.low, whole.box.high
        d = int(
            ((high - low) * 2 >= (high - low).max()).argmax()
        )  # an early one: walks are shorter
        middle = int(low[d] + high[d]) // 2
        parts = list[_Open]()
        for least, most in ((low[d], middle), (middle + 1, high[d])):
            lower, upper = low.copy(), high.copy()
            lower[: d + 1] = np.maximum(low[: d + 1], least)  # counts never rise
            upper[d:] = np.minimum(high[d:], most)
            if (lower <= upper).all():
                self.boxes += 1
                parts.append(_Open(whole.bound, self.boxes, self._box(lower, upper), whole.start))
        return parts

    def _improved(self, one: _Open, steps: int) -> _Open | None:
        """The box, smaller and with a better bound; None where all in it is above the target."""
        spent = self.work
        start = climb(self.tokens, one.box, self.budget, one.start, steps, self._over)
        self.work += CLIMB * steps * start.tokens.size
        found = self._bounded(replace(one, start=start))
        if found is None or self._over():
            return found and found[0]
        return self._walked(*found, WALK * (self.work - spent))

    def _bounded(self, one: _Open, trims: int = TRIMS) -> tuple[_Open, Relaxed] | None:
        """The same by its multipliers alone, with the last answer."""
        answer = Relaxed.answer(self.tokens, one.box, one.start.tokens, self.spending)
        if answer is None:
            return None
        self.work += answer.numbers
        through = answer.through
        value = max(float(bounds.min()) for bounds in through)  # each of them is one
        if value >= self.target:
            return None
        one = replace(one, bound=max(one.bound, value), box=self._trimmed(one.box, through))
        self.progress("bound", self.objective, one.bound)
        same = np.array_equal([one.box.low, one.box.high], [answer.box.low, answer.box.high])
        if same or trims <= 1 or self._over():
            return one, answer
        return self._bounded(one, trims - 1)

    def _walked(self, one: _Open, answer: Relaxed, work: float) -> _Open | None:
        """With what walks through the schedules of a box prove, to higher thresholds, each with
        its share of the work; None where that is all."""
        bound = one.bound
        for share in SHARES:
            threshold, indices = bound + share * (self.target - bound), int(share * work / INDEX)
            walk = Walk(
                self.problem,
                self.spending,
                answer,
                one.start.tokens,
                threshold,
                indices,
                self._over,
            )
            ended = walk.ends()
            self.work += INDEX * (indices - max(0, walk.left))
            if not ended:
                return one
            one = replace(one, bound=min(threshold, walk.least))
            self.target = min(self.target, walk.least)
            self.progress("bound", self.objective, one.bound)
        return None

    def _trimmed(self, box: Box, through: list[Floats]) -> Box:
        """Without the cells at the ends that hold nothing below the target."""
        low, high = box.low.copy(), box.high.copy()
        for d, bounds in enumerate(through):
            good = np.flatnonzero(bounds < self.target)
            low[d] = box.starts[d][good[0]]
            high[d] = min(box.cell(d, int(good[-1])).stop - 1, int(high[d]))
        return self._box(low, high)


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
    units = np.tile(np.arange(problem.first + 1), (problem.n_decisions, 1))
    spending = Spending(units, total, all_of_it)
    return Search(problem, spending, objective, goal, progress).run()
