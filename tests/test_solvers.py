"""The schedule solvers against brute force, a naive oracle and each other."""

from __future__ import annotations

from itertools import combinations_with_replacement

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.calib.schedule import Evidence, pose, solve
from edgeprune.calib.solvers import exact, joint, paper
from edgeprune.calib.solvers._bound import simple_bound
from edgeprune.calib.solvers._certificate import certify
from edgeprune.calib.solvers._problem import Goal, round_to_sum
from edgeprune.errors import ScheduleError, SpecError


def evidence(
    seed: int, samples: int, layers: int, tokens: int, agree: float = 0.5, ties: bool = False
) -> Evidence:
    """Log-normal attention; `agree` is the share of its variance that layers have in common."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(samples, 1, tokens))
    own = rng.normal(size=(samples, layers, tokens))
    attention = np.exp(1.5 * (np.sqrt(agree) * shared + np.sqrt(1 - agree) * own))
    if ties:
        attention = np.floor(attention)  # many equal, some zero
    loss = np.exp(-2 * np.arange(layers) / layers) * rng.uniform(0.5, 1.5, (samples, layers))
    entry = rng.normal(size=(samples, tokens))
    return Evidence(attention, loss, entry, tuple(f"s{i}" for i in range(samples)))


def naive_loss(data: Evidence, counts: tuple[int, ...]) -> float:
    """Eq. (3) by sets, straight from its definition."""
    samples, layers, tokens = data.attention.shape
    total = 0.0
    for s in range(samples):
        alive = set(range(tokens))
        if counts[0] < tokens:
            alive = set(sorted(alive, key=lambda j: (-data.entry[s, j], j))[: counts[0]])
        for index in range(1, layers):
            score, price = data.attention[s, index - 1], data.attention[s, index]
            kept = set(sorted(alive, key=lambda j: (-score[j], j))[: counts[index]])
            if price.sum() > 0:
                total += data.loss[s, index] * sum(price[j] for j in alive - kept) / price.sum()
            alive = kept
    return total / samples


def brute_force(data: Evidence, cr: float, first: int) -> float:
    """The least loss over all schedules of the budget."""
    _, layers, tokens = data.attention.shape
    rest = round(tokens * layers / cr) - first
    falls = combinations_with_replacement(range(first, -1, -1), layers - 1)
    return min(naive_loss(data, (first, *counts)) for counts in falls if sum(counts) == rest)


TINY = [
    # seed, samples, layers, tokens, first, cr, ties
    (
        seed,
        1 + seed % 2,
        3 + seed % 3,
        4 + seed % 4,
        4 + seed % 4 - (seed // 4) % 2,
        cr,
        seed % 5 == 0,
    )
    for seed, cr in enumerate([1.3, 1.6, 2.0, 2.5] * 6)
]


@pytest.mark.parametrize(("seed", "samples", "layers", "tokens", "first", "cr", "ties"), TINY)
def test_exact_finds_what_brute_force_finds(seed, samples, layers, tokens, first, cr, ties):
    data = evidence(seed, samples, layers, tokens, agree=0.3, ties=ties)
    best = brute_force(data, cr, first)
    found = exact.solve(pose(data, cr, first))
    assert naive_loss(data, tuple(found.counts)) == pytest.approx(best, abs=1e-9)
    assert found.bound == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize(("seed", "samples", "layers", "tokens", "first", "cr", "ties"), TINY)
def test_no_bound_lies_above_the_optimum(seed, samples, layers, tokens, first, cr, ties):
    data = evidence(seed, samples, layers, tokens, agree=0.3, ties=ties)
    best = brute_force(data, cr, first)
    problem = pose(data, cr, first)
    assert simple_bound(problem)[0] <= best + 1e-12
    # not even where all that is known is a schedule three times as bad
    assert certify(problem, 3 * best, Goal(gap=0)) <= best * (1 + 1e-9)
    assert joint.solve(problem).objective >= best - 1e-12


@pytest.mark.parametrize(("seed", "samples", "layers", "tokens", "first", "cr", "ties"), TINY)
def test_a_finished_search_proves_the_optimum(seed, samples, layers, tokens, first, cr, ties):
    data = evidence(seed, samples, layers, tokens, agree=0.3, ties=ties)
    best = brute_force(data, cr, first)
    bound = certify(pose(data, cr, first), best, Goal(gap=0.01))
    assert bound == pytest.approx(0.99 * best, abs=1e-8)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_evaluate_is_the_loss_of_nested_sets(data):
    layers, tokens = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 8))
    measured = evidence(
        data.draw(st.integers(0, 999)), data.draw(st.integers(1, 3)), layers, tokens,
        ties=data.draw(st.booleans()),
    )  # fmt: skip
    first = data.draw(st.integers(1, tokens))
    rest = st.lists(st.integers(0, first), min_size=layers - 1, max_size=layers - 1)
    batch = [(first, *sorted(data.draw(rest), reverse=True)) for _ in range(3)]
    problem = pose(measured, tokens * layers / (first * layers), first)
    got = problem.evaluate(np.array(batch))
    assert got == pytest.approx([naive_loss(measured, counts) for counts in batch], abs=1e-12)


def test_evaluation_in_chunks_changes_nothing(monkeypatch):
    problem = pose(evidence(1, 3, 4, 9), 2.0, 9)
    counts = np.array([(9, 6, 2, 1), (9, 3, 3, 3), (9, 9, 0, 0)])
    whole = problem.evaluate(counts)
    monkeypatch.setattr("edgeprune.calib.solvers._problem.CHUNK", 1)
    assert problem.evaluate(counts) == pytest.approx(whole)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_every_schedule_keeps_the_budget_and_never_rises(data):
    layers, tokens = data.draw(st.integers(2, 6)), data.draw(st.integers(1, 24))
    first = data.draw(st.integers(1, tokens))
    least, most = tokens / first, tokens * layers / first
    cr = data.draw(st.floats(least, most))
    solver = data.draw(st.sampled_from(["joint", "paper"]))
    samples = data.draw(st.integers(1, 3))
    agree = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    measured = evidence(data.draw(st.integers(0, 99)), samples, layers, tokens, agree)
    schedule = solve(measured, cr=cr, first=first, solver=solver, goal=Goal(seconds=0.2))
    assert sum(schedule.counts) == round(tokens * layers / cr)
    assert schedule.counts[0] == first
    assert all(np.diff(schedule.counts) <= 0) and schedule.counts[-1] >= 0
    assert 0 <= schedule.bound <= schedule.objective
    assert schedule.objective == pytest.approx(naive_loss(measured, schedule.counts), abs=1e-9)
    assert schedule.loss == pytest.approx(measured.loss.mean(0), abs=1e-6)


@pytest.mark.parametrize(
    ("seed", "samples", "agree", "cr"),
    [(0, 1, 0.0, 2), (1, 1, 0.6, 4), (2, 1, 0.9, 6), (3, 2, 0.6, 3)],
)
def test_joint_comes_within_3_percent_of_the_optimum(seed, samples, agree, cr):
    problem = pose(evidence(seed, samples, 8, 32, agree), cr, 32)
    best, found = exact.solve(problem), joint.solve(problem, goal=Goal(seconds=1))
    assert found.bound <= best.objective <= found.objective + 1e-9
    assert found.objective <= 1.03 * best.objective


def test_layers_that_rank_alike_are_solved_to_the_optimum():
    """With one order for all layers the alive sets depend on counts alone."""
    problem = pose(evidence(4, 1, 6, 24, agree=1.0), 3, 24)
    best = exact.solve(problem).objective
    assert joint.solve(problem).objective == pytest.approx(best, rel=1e-6)


def test_the_bound_is_within_5_percent_of_eight_layers():
    problem = pose(evidence(5, 2, 8, 32, 0.9), 4, 32)
    found = joint.solve(problem, goal=Goal(seconds=20))
    assert found.bound >= 0.949 * found.objective
    assert found.bound <= exact.solve(problem).objective


def test_cells_of_several_counts_bound_what_single_counts_do(monkeypatch):
    problem = pose(evidence(6, 2, 5, 24, 0.6), 3, 24)
    best = exact.solve(problem).objective
    monkeypatch.setattr("edgeprune.calib.solvers._certificate.MOST_CELLS", 5)
    heard = []
    bound = certify(problem, best, Goal(gap=0.02), lambda *news: heard.append(news))
    assert 0 < bound <= best and any(news[2] > 0 for news in heard)


def test_a_patient_search_ends_with_what_is_proven(monkeypatch):
    problem = pose(evidence(5, 2, 8, 32, 0.3), 4, 32)
    calls = []

    def pressed(*news):
        calls.append(news)
        if len(calls) == 2:
            raise KeyboardInterrupt

    objective = joint.search(problem)[1]
    bound = certify(problem, objective, Goal(gap=0, patient=True), pressed)
    assert 0 <= bound < objective
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        certify(problem, objective, Goal(gap=0), pressed)


def test_few_sites_mean_few_falls_and_a_sum_just_below_the_budget():
    data = evidence(6, 2, 10, 40)
    losses = []
    for sites in (1, 2, 4):
        schedule = solve(data, cr=4, first=40, max_sites=sites, goal=Goal(seconds=1))
        spare = 100 - sum(schedule.counts)
        assert (np.diff(schedule.counts) < 0).sum() <= sites
        assert 0 <= spare < 10
        losses.append(schedule.objective)
    assert losses == sorted(losses, reverse=True), "more freedom should not cost more"


def test_the_same_evidence_gives_the_same_schedule():
    data = evidence(7, 3, 6, 20)
    assert joint.solve(pose(data, 2, 20)).counts.tolist() == (
        joint.solve(pose(data, 2, 20)).counts.tolist()
    )


def test_a_time_limit_still_gives_a_schedule_with_an_honest_bound():
    problem = pose(evidence(8, 1, 12, 96, 0.3), 3, 96)
    stopped = exact.solve(problem, time_limit=0.05)
    assert stopped.counts.sum() == problem.total
    assert stopped.bound < stopped.objective
    assert joint.solve(problem, goal=Goal(seconds=0)).counts.sum() == problem.total


def test_progress_is_told_steps_objectives_and_bounds():
    heard = []
    data = evidence(9, 2, 6, 32)
    for solver in ("joint", "exact", "paper"):
        goal = Goal(seconds=1)
        solve(data, cr=3, first=32, solver=solver, goal=goal, progress=lambda *n: heard.append(n))
    steps = {step.split()[0] for step, _, _ in heard}
    assert {"polish", "bound", "exact", "sample"} <= steps
    assert all(bound <= objective for _, objective, bound in heard)


def test_paper_averages_what_each_sample_would_choose():
    data = evidence(10, 3, 5, 16)
    problem = pose(data, 2, 16)
    alone = [exact.solve(problem.sample(s)).counts for s in range(3)]
    expected = round_to_sum(np.mean(alone, axis=0), problem.total)
    assert paper.solve(problem).counts.tolist() == expected.tolist()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 50), min_size=6, max_size=6), min_size=1, max_size=7))
def test_rounding_a_mean_keeps_its_sum_and_its_order(rows):
    falling = np.sort(rows, axis=1)[:, ::-1]
    level = falling.sum(1).min()  # the same sum in all rows, as schedules have
    falling = np.array([_lowered(row, level) for row in falling])
    counts = round_to_sum(falling.mean(0), level)
    assert counts.sum() == level
    assert (np.diff(counts) <= 0).all()


def _lowered(row: np.ndarray, total: int) -> np.ndarray:
    """Take from the end until the row sums to `total`; it still never rises."""
    spent = np.minimum(row.cumsum(), total)
    return np.diff(spent, prepend=0)


@pytest.mark.parametrize(
    ("cr", "first", "says"),
    [
        (20, 12, "ask for CR 1 to 6"),
        (1.2, 6, "ask for CR 2 to 12"),
        (0.5, 12, "at least 1"),
        (float("nan"), 12, "at least 1"),
        (2, 13, "1 to 12"),
        (2, 0, "1 to 12"),
    ],
)
def test_what_cannot_be_met_is_refused_with_what_could(cr, first, says):
    with pytest.raises(SpecError, match=says):
        solve(evidence(0, 1, 6, 12), cr=cr, first=first)


def test_options_that_do_not_fit_together_are_refused():
    data = evidence(0, 1, 6, 12)
    with pytest.raises(SpecError, match="choose one of"):
        solve(data, cr=2, first=12, solver="best")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="needs solver joint"):
        solve(data, cr=2, first=12, solver="exact", max_sites=3)
    everyone = Evidence(data.attention, data.loss, None, data.sample_ids)
    with pytest.raises(SpecError, match="no entry score"):
        solve(everyone, cr=3, first=6)


def test_one_compression_ratio_leaves_no_choice():
    data = evidence(0, 1, 6, 12)
    for solver in ("joint", "exact", "paper"):
        dense = solve(data, cr=1, first=12, solver=solver)
        assert (dense.counts, dense.objective, dense.gap) == ((12,) * 6, 0, 0)
        bare = solve(data, cr=6, first=12, solver=solver)
        assert bare.counts == (12, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("part", "value", "says"),
    [
        ("attention", np.ones((2, 1, 4)), "two layers or more"),
        ("attention", np.full((2, 3, 4), np.nan), "finite"),
        ("attention", -np.ones((2, 3, 4)), "not negative"),
        ("loss", np.ones((2, 4)), "loss is"),
        ("entry", np.ones((2, 5)), "entry is"),
        ("sample_ids", ("a",), "2 samples have 1 ids"),
    ],
)
def test_evidence_that_cannot_be_is_refused(part, value, says):
    good = {"attention": np.ones((2, 3, 4)), "loss": np.ones((2, 3)), "entry": None}
    with pytest.raises(ScheduleError, match=says):
        Evidence(**{**good, "sample_ids": ("a", "b"), part: value})
