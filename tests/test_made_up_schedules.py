"""Made-up schedules reach their ratio exactly, or say in one line that none can."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.schedules import declining, planned
from edgeprune.errors import SpecError
from edgeprune.policies import make
from edgeprune.spec import ModelShape, PruneSpec, budget

SHAPE = ModelShape("llava", 16, (4, 4), 6, 16, 32, 2, 2, 8, 99, 64, has_cls=True)


@given(visual=st.integers(1, 300), layers=st.integers(1, 32), cr=st.floats(1, 40))
def test_counts_fall_and_their_sum_is_exact(visual: int, layers: int, cr: float) -> None:
    total, first = budget(visual, layers, cr), min(visual, round(4 * visual / cr))
    if first > total:
        with pytest.raises(SpecError, match="no schedule of"):
            declining(visual, layers, cr)
        return
    counts = declining(visual, layers, cr)
    assert (len(counts), sum(counts)) == (layers, total)
    assert list(counts) == sorted(counts, reverse=True) and counts[-1] >= 0
    assert layers == 1 or counts[0] == first


def test_a_ratio_out_of_reach_is_refused_in_a_line() -> None:
    with pytest.raises(SpecError, match="no schedule of 3 layers reaches CR 4: 16 of 16 visual"):
        declining(16, 3, 4)


def test_only_a_method_that_calibrates_gets_a_schedule() -> None:
    utp, uniform = (make(PruneSpec(name, 4)) for name in ("utp", "uniform"))
    assert planned(utp, SHAPE, 4).counts == declining(16, 6, 4)
    assert planned(utp, SHAPE, 4, (9, 5, 4, 3, 2, 1)).counts == (9, 5, 4, 3, 2, 1)
    assert planned(uniform, SHAPE, 4, (9, 5, 4, 3, 2, 1)).counts == (4,) * 6
