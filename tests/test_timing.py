"""Tables of times, profiles as files, and schedules under a budget of time."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.calib.solvers import timed
from edgeprune.calib.solvers._problem import Goal, Problem
from edgeprune.calib.solvers.timed import Times
from edgeprune.errors import InputError
from edgeprune.timing import (
    KindTimes,
    Profile,
    Profiled,
    Spread,
    Table,
    monotone,
    read_profile,
)


def table(counts: list[int], ms: list[float]) -> Table:
    return Table.of(counts, [Spread(one, one, one) for one in ms])


PROFILE = Profile(
    model=Profiled("llava", 3, 64, 96, 16, 2, 16, 1, "fp32", "float"),
    backend="ort-cpu",
    threads=None,
    machine={"processor": "made up"},
    text_tokens=32,
    rounds=1,
    image=(56, 56),
    read=Spread(1, 1, 1),
    preprocess=Spread(2, 2, 2),
    vision=Spread(20, 20, 20),
    prefill=table([1, 16], [6, 36]),
    block=table([1, 17], [1, 9]),
    whole=Spread(60, 60, 60),
    choices=(
        KindTimes("exit:by=pixels", table([4, 12], [0.25, 0.5])),
        KindTimes("exit:by=salient", table([4, 12], [1, 3])),
        KindTimes("drop:by=pixels", table([4, 12], [0.25, 0.5])),
        KindTimes("drop:by=salient", table([4, 12], [0.5, 1.5])),
    ),
    sites=(
        KindTimes("query=last, one position", table([1, 16], [0.5, 2])),
        KindTimes("query=last", table([1, 16], [0.25, 1])),
    ),
)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=20))
def test_pooling_never_falls_and_keeps_the_mean(values: list[float]) -> None:
    found = monotone(values)
    assert len(found) == len(values)
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(found))
    assert sum(found) == pytest.approx(sum(values))
    if all(a <= b for a, b in itertools.pairwise(values)):
        assert list(found) == pytest.approx(values)


def test_between_counts_a_table_is_a_line() -> None:
    found = table([2, 4, 8], [1.0, 3.0, 3.0])
    wanted = [1, 1, 1, 2, 3, 3, 3, 3, 3, 3]
    assert [found.at(n) for n in range(10)] == pytest.approx(wanted)
    assert table([1, 2], [1.0, 3.0]).at(4) == pytest.approx(7)  # on the last line
    assert found.plateaus() == [(4, 8)]


def test_a_profile_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_text(PROFILE.to_json())
    assert read_profile(file) == PROFILE
    broken: list[object] = [
        json.loads(PROFILE.to_json()) | change
        for change in (
            {"schema": 9},
            {"prefill": {"counts": [1, 2], "measured": [], "ms": [1.0]}},
            {"backend": 3},
        )
    ]
    falling = replace(PROFILE.prefill, ms=(9.0, 1.0))
    twice = (KindTimes("a", PROFILE.prefill),) * 2
    for wrong in (replace(PROFILE, prefill=falling), replace(PROFILE, sites=twice)):
        broken.append(json.loads(wrong.to_json()))
    for content in (*broken, [], "x"):
        file.write_text(json.dumps(content))
        with pytest.raises(InputError, match=r"is no profile .* edgeprune profile") as refused:
            read_profile(file)
        assert "attribute" not in str(refused.value)
    with pytest.raises(InputError):
        read_profile(tmp_path / "absent")


def instance(seed: int) -> tuple[Problem, Times, int]:
    """Four layers, eight tokens, two samples; times in steps, of plateaus and jumps, and where the
    count falls."""
    rng, samples, layers, tokens = np.random.default_rng(seed), 2, 4, 8
    attention = rng.lognormal(0, 1.5, (samples, layers, tokens))
    loss = rng.uniform(0.05, 1, (samples, layers))
    loss[:, 0] = 0
    rises = rng.integers(0, 2, tokens) * rng.integers(1, 9, tokens)
    one = np.r_[0, np.cumsum(rises)].astype(np.intp)
    slower = 1 + rng.integers(0, 1 + seed % 2, (layers, 1))  # layers of two kinds
    falls = np.tile(np.arange(tokens + 1) // 4, (layers - 1, 1)) * (seed % 3)
    problem = Problem.pose(attention, loss, None, tokens, tokens)
    times = Times(one * slower, falls)
    behind = int(times.units[1:, -1].sum())
    return problem, times, int(times.units[0, -1] + 0.45 * behind)


def every(layers: int, tokens: int) -> np.ndarray:
    tails = itertools.combinations_with_replacement(range(tokens, -1, -1), layers - 1)
    return np.array([[tokens, *tail] for tail in tails])


@pytest.mark.parametrize("seed", range(20))
def test_the_best_of_all_schedules_within_a_time(seed: int) -> None:
    problem, times, budget = instance(seed)
    schedules = every(4, 8)
    fitting = schedules[times.of(schedules) <= budget]
    best = float(problem.evaluate(fitting).min())
    found = timed.solve(problem, times, times, budget)
    assert found is not None
    assert times.of(found.counts[None])[0] <= budget
    assert found.objective == pytest.approx(float(problem.evaluate(found.counts[None])[0]))
    assert found.objective == pytest.approx(best)
    assert 0 <= found.bound <= best + 1e-9
    assert found.bound >= 0.949 * best


def open_instance(seed: int) -> tuple[tuple[np.ndarray, ...], Problem, Times, int]:
    """The same with r_1 open: attention, loss, entry scores and what an entry loses."""
    rng, samples, layers, tokens = np.random.default_rng(100 + seed), 2, 3, 8
    attention = rng.lognormal(0, 1.5, (samples, layers, tokens))
    loss, entry = rng.uniform(0.05, 1, (samples, layers)), rng.normal(size=(samples, tokens))
    lost = np.r_[np.sort(rng.uniform(0, 0.3, tokens))[::-1], 0.0]
    units = np.r_[0, np.cumsum(rng.integers(1, 9, tokens))].astype(np.intp)
    problem = Problem.pose_open(attention, loss, entry, lost, 2)
    times = Times(np.tile(units, (layers, 1)), np.tile(np.arange(tokens + 1) // 3, (2, 1)))
    return (attention, loss, entry, lost), problem, times, int(1.3 * units[-1])


@pytest.mark.parametrize("seed", range(10))
def test_how_many_enter_layer_1_is_chosen_too(seed: int) -> None:
    (attention, loss, entry, lost), problem, times, budget = open_instance(seed)
    best = np.inf
    for first in range(2, 9):
        alone = Problem.pose(attention, loss, entry, first, first)
        schedules = every(3, first)
        fitting = schedules[times.of(schedules) <= budget]
        if len(fitting):
            best = min(best, lost[first] + float(alone.evaluate(fitting).min()))
    found = timed.solve(problem, times, times, budget)
    assert found is not None and len(found.counts) == 3 and found.counts[0] >= 2
    assert times.of(found.counts[None])[0] <= budget
    assert found.objective == pytest.approx(best)
    assert 0.949 * best <= found.bound <= best + 1e-9
    for units, least, counts in timed.frontier(problem, times):
        assert times.of(counts[None])[0] == units and counts[0] >= 2
        alone = Problem.pose(attention, loss, entry, int(counts[0]), 1)
        assert least == pytest.approx(lost[counts[0]] + float(alone.evaluate(counts[None])[0]))


def test_the_frontier_falls_and_ends_with_all_tokens() -> None:
    problem, times, _ = instance(4)
    found = timed.frontier(problem, times)
    spent, losses = [one[0] for one in found], [one[1] for one in found]
    assert spent == sorted(spent) and losses == sorted(losses, reverse=True)
    for units, loss, counts in found:
        assert times.of(counts[None])[0] == units
        assert float(problem.evaluate(counts[None])[0]) == pytest.approx(loss)
    assert losses[-1] == 0
    assert timed.solve(problem, times, times, int(times.units[0, -1]) - 1) is None


def test_the_frontier_begins_near_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though a sweep holds fewer cells than there are schedules to tell apart."""
    monkeypatch.setattr(timed, "MEMORY", 1)
    problem, times = crowded(seed=0)
    fastest = timed.frontier(problem, times)[0][0]
    least = int(times.units[0, -1] + times.units[1:, 0].sum())
    assert least <= fastest <= 1.1 * least


def test_a_schedule_is_no_worse_than_known_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coarse sweep alone misses some of these."""
    monkeypatch.setattr(timed, "MEMORY", 1)
    problem, times = crowded(seed=1)
    for spent, loss, counts in timed.frontier(problem, times)[22:26]:
        found = timed.solve(problem, times, times, spent, Goal(seconds=0), known=counts)
        assert found is not None and found.objective <= loss + 1e-12


def crowded(seed: int) -> tuple[Problem, Times]:
    """More schedules to tell apart than a sweep with little memory has cells."""
    rng, samples, layers, tokens = np.random.default_rng(seed), 2, 12, 60
    loss = rng.uniform(0.05, 1, (samples, layers))
    attention = rng.lognormal(0, 1.5, (samples, layers, tokens))
    problem = Problem.pose(attention, loss, None, tokens, tokens * layers)
    units = np.arange(10, 11 + tokens).astype(np.intp)
    falls = np.zeros((layers - 1, tokens + 1), np.intp)
    return problem, Times(np.tile(units, (layers, 1)), falls)
