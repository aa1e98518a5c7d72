"""The search of scenes576 chooses as the methods do, many images at once."""

from __future__ import annotations

import pytest
import torch

from benchmarks.scenes576.search_plans import VISUAL, plans
from benchmarks.scenes576.selections import Seen, determinant, spread
from edgeprune.policies import _diverse
from edgeprune.policies._select import max_min


def _vectors() -> torch.Tensor:
    """Of three images: [3, 40, 16]."""
    return torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("keep", [1, 7, 12])
def test_a_determinant_is_that_of_the_method(keep: int) -> None:
    vectors = _vectors()
    for found, own in zip(determinant(vectors, keep), vectors, strict=True):
        assert found.tolist() == _diverse.determinant(own, keep, keep).tolist()


def test_what_is_spread_is_that_of_divprune() -> None:
    inputs = _vectors()
    seen = Seen(0, 40, inputs, torch.zeros(3), inputs, inputs[:, :0])
    for found, own in zip(spread(seen, 9), inputs, strict=True):
        assert found.tolist() == max_min(own, 9).tolist()


def test_plans_hold_the_ratio_that_they_are_named_by() -> None:
    every = list(plans(30))
    assert len({plan.name for plan in every}) == len(every)
    for plan in every:
        named = plan.name.partition(" ")[0]
        if named.startswith("CR"):
            assert abs(plan.cr(30) / float(named[2:]) - 1) < 0.03, plan.name
        assert all(0 < keep < VISUAL for _, _, keep in plan.sites)
