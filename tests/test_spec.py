"""Plans: counts, compression ratio, and what is refused."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.errors import SpecError
from edgeprune.spec import Plan, PruneSpec, Stage, budget, check_cr, plan_from_counts

FALLING = st.lists(st.integers(0, 60), min_size=2, max_size=12).map(
    lambda counts: tuple(sorted(counts, reverse=True))
)


@given(FALLING)
def test_a_plan_gives_back_the_counts_it_was_made_from(counts: tuple[int, ...]) -> None:
    plan = plan_from_counts(60, counts)
    assert plan.counts == counts
    assert len(plan.stages) == len({60, *counts}) - 1, "a stage only where the count falls"
    if sum(counts):
        assert plan.cr == pytest.approx(60 * len(counts) / sum(counts))


@pytest.mark.parametrize("cr", [0.99, 0, -4, math.nan, math.inf])
def test_a_ratio_that_is_none_is_refused(cr: float) -> None:
    with pytest.raises(SpecError, match="at least 1"):
        PruneSpec("utp", cr)


def test_counts_may_not_rise() -> None:
    with pytest.raises(SpecError, match="cannot leave 30"):
        plan_from_counts(60, (40, 20, 30))


def test_stages_come_in_order() -> None:
    with pytest.raises(SpecError, match="rise"):
        Plan(60, 4, (Stage("layer", 30, layer=3), Stage("layer", 20, layer=2)))
    with pytest.raises(SpecError, match="rise"):
        Plan(60, 4, (Stage("layer", 30, layer=5),))


def test_merged_tokens_count() -> None:
    plan = Plan(60, 2, (Stage("vision", keep=20, merged=10),))
    assert plan.counts == (30, 30)
    assert plan.cr == 2


@given(st.integers(1, 600), st.integers(1, 40), st.floats(1, 64))
def test_a_budget_is_within_half_a_token(visual: int, layers: int, cr: float) -> None:
    assert abs(budget(visual, layers, cr) - visual * layers / cr) <= 0.5


def test_a_plan_of_another_ratio_is_refused() -> None:
    plan = plan_from_counts(100, (50,) * 10)
    check_cr(plan, 2)
    with pytest.raises(SpecError, match="allows 250"):
        check_cr(plan, 4)
