"""The parts of the search for a bound: tables, multipliers, walks through the first layers."""

from __future__ import annotations

import numpy as np
import pytest

from edgeprune.calib.schedule import pose
from edgeprune.calib.solvers import joint
from edgeprune.calib.solvers._certificate import Search
from edgeprune.calib.solvers._climb import Start, climb
from edgeprune.calib.solvers._pairs import Box, Tokens
from edgeprune.calib.solvers._prefixes import Walk
from edgeprune.calib.solvers._problem import Goal, Ints, Problem
from edgeprune.calib.solvers._relaxed import Relaxed, Spending
from tests.test_solvers import evidence


def schedules(problem: Problem, *, any_sum: bool = False) -> Ints:
    """All of a small problem's budget: [C, L]; with `any_sum` those of any other, too."""
    counts = np.array([[problem.first]])
    for _ in range(problem.n_decisions):
        more = np.repeat(counts, problem.first + 1, 0)
        last = np.tile(np.arange(problem.first + 1), len(counts))
        counts = np.column_stack([more, last])[last <= more[:, -1]]
    return counts if any_sum else counts[counts.sum(1) == problem.total]


def spending_of(problem: Problem, *, all_of_it: bool = True) -> Spending:
    units = np.tile(np.arange(problem.first + 1), (problem.n_decisions, 1))
    return Spending(units, problem.total - problem.first, all_of_it)


def box_of(problem: Problem, width: int = 1) -> Box:
    none = np.zeros(problem.n_decisions, np.intp)
    return Box(none, none + problem.first, width)


@pytest.mark.parametrize("width", [1, 2, 3, 5])
@pytest.mark.parametrize("cuts", [192, 4])
def test_no_schedule_loses_less_than_its_cells_allow(
    width: int, cuts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With any multipliers, in boxes of any kind: the tables are bounds."""
    monkeypatch.setattr("edgeprune.calib.solvers._pairs.MOST_CUTS", cuts)
    rng = np.random.default_rng(width)
    for seed in range(6):
        problem = pose(evidence(seed, 2, 4, 9, 0.3, ties=seed == 3), 2, 9)
        every, tokens = schedules(problem), Tokens.of(problem)
        losses = problem.evaluate(every)
        low = np.sort(rng.integers(0, 4, problem.n_decisions))[::-1]
        high = np.maximum(low, np.sort(rng.integers(3, 10, problem.n_decisions))[::-1])
        inside = ((every[:, 1:] >= low) & (every[:, 1:] <= high)).all(1)
        at = rng.normal(0, 0.05, (problem.n_decisions - 1, 2, 9)).astype(np.float32)
        box = Box(low, high, width)
        answer = Relaxed.answer(tokens, box, at, spending_of(problem))
        if answer is None:
            assert not inside.any()
            continue
        for d, bounds in enumerate(answer.through):
            cells = (every[inside, d + 1] - low[d]) // width
            assert (bounds[cells] <= losses[inside] + 1e-12).all()


@pytest.mark.parametrize("seed", range(4))
def test_a_walk_finds_the_best_schedule_below_a_threshold(seed: int) -> None:
    problem = pose(evidence(seed, 2, 5, 8, 0.5), 2, 8)
    best = float(problem.evaluate(schedules(problem)).min())
    tokens, spending = Tokens.of(problem), spending_of(problem)
    start = Start.of(tokens, best / spending.total)
    answer = Relaxed.answer(tokens, box_of(problem), start.tokens, spending)
    assert answer is not None

    def walked(threshold: float, left: int = 10**9, over: bool = False) -> Walk:
        return Walk(problem, spending, answer, start.tokens, threshold, left, lambda: over)

    walk = walked(1.2 * best)
    assert walk.ends() and walk.least == pytest.approx(best, abs=1e-12)
    walk = walked(best * (1 - 1e-9))
    assert walk.ends() and walk.least == np.inf
    assert not walked(1.2 * best, left=10).ends()
    assert not walked(1.2 * best, over=True).ends()


@pytest.mark.parametrize("buckets", [600, 3])
@pytest.mark.parametrize("width", [1, 3])
def test_a_walk_proves_nothing_that_is_wrong_of_budgets_of_time(
    buckets: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With steps in the times, slower and faster layers, falls that take time, in cells, with
    spending rounded down."""
    monkeypatch.setattr("edgeprune.calib.solvers._relaxed.BUCKETS", buckets)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        problem = pose(evidence(seed, 2, 4, 9, 0.3), 1, 9)
        steps = 2 + rng.integers(0, 4, 10).cumsum() * (rng.integers(0, 3, 10) + 1).max()
        units, each = steps * rng.integers(1, 4, (3, 1)), np.arange(3)
        total = int(rng.integers(units[:, 0].sum(), units[:, 9].sum() + 1))
        chosen = rng.integers(0, 9, (3, 10)).cumsum(1) * (seed % 3)
        for all_of_it in (False, True):
            falls = np.zeros_like(units) if all_of_it else chosen
            spending = Spending(units, total, all_of_it, falls)
            counts = schedules(problem, any_sum=True)
            fell = np.diff(counts, axis=1) < 0
            spent = (units[each, counts[:, 1:]] + fell * falls[each, counts[:, :-1]]).sum(1)
            losses = problem.evaluate(counts)[spent == total if all_of_it else spent <= total]
            best = float(losses.min(initial=np.inf))
            tokens = Tokens.of(problem)
            start = Start.of(tokens, 0.02)
            answer = Relaxed.answer(tokens, box_of(problem, width), start.tokens, spending)
            if answer is None:
                assert best == np.inf
                continue
            for threshold in (0.5, 1.0 if best == np.inf else 1.01 * best, 9.0):
                walk = Walk(
                    problem, spending, answer, start.tokens, threshold, 10**9, lambda: False
                )
                assert walk.ends()
                assert walk.least == (pytest.approx(best) if best < threshold else np.inf)


def test_a_climb_finds_multipliers_that_bound_better() -> None:
    problem = pose(evidence(1, 8, 6, 32, 0.8), 3, 32)
    tokens, spending, box = Tokens.of(problem), spending_of(problem), box_of(problem)
    objective = joint.search(problem)[1]

    def bound(start: Start) -> float:
        answer = Relaxed.answer(tokens, box, start.tokens, spending)
        assert answer is not None
        return float(answer.through[-1].min()) / objective

    begun = Start.of(tokens, objective / spending.total)
    reached = climb(tokens, box, spending.total, begun, 300)
    assert bound(begun) + 0.1 < bound(reached) <= 1
    assert abs(reached.samples.mean(1)).max() < 1e-6


def test_a_better_schedule_than_the_known_one_is_no_danger() -> None:
    """The bound stays below what the walk comes across."""
    problem = pose(evidence(2, 2, 5, 8, 0.5), 2, 8)
    best = float(problem.evaluate(schedules(problem)).min())
    for known in (2 * best, 10 * best):
        bound = Search(problem, spending_of(problem), known, Goal(gap=0)).run()
        assert bound == pytest.approx(best, rel=1e-6) and bound <= best
