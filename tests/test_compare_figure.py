"""The figure of a comparison: names that stand free, nothing on the margin, any number of lines."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.compare.figure import PALETTE, figure, ticks
from edgeprune.compare.labels import Box, column, placed, spread
from edgeprune.compare.results import Comparison, Result
from edgeprune.drawing import png

PARTS = ("vision", "prefill", "decode")


def comparison(methods: int, ratios: int, timed: bool) -> Comparison:
    """Made-up results; later methods are worse, higher ratios too."""

    def one(method: str, cr: float, right: int) -> Result:
        rounds = {part: [2 + 8 / cr + 0.1 * methods] * 3 for part in PARTS} if timed else {}
        return Result(method, cr, cr, (1,), {"all": right}, {"all": 1000}, 0, "", 9, rounds)

    cells = [one("none", 1, 990)]
    for i in range(methods):
        for step in range(1, ratios + 1):
            cells.append(one(f"method{i}", 2.0**step, max(0, 985 - 9 * i * step - 20 * step)))
    setup = {"model": "demo", "questions": 1000, "timing": {"rounds": 3}}
    return Comparison(setup, tuple(cells))


@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize(("methods", "ratios"), [(0, 0), (1, 1), (3, 4), (25, 4), (2, 9)])
def test_any_number_of_lines_fits(methods: int, ratios: int, timed: bool) -> None:
    image = np.asarray(png.render(figure(comparison(methods, ratios, timed))))
    assert image.shape == (800, 1200, 3)
    border = image.copy()
    border[30:-20, 30:-30] = 255
    assert (border == 255).all(), "nothing is drawn on the margin"
    colours = {tuple(colour) for colour in image.reshape(-1, 3)}
    assert set(PALETTE[:methods]) <= colours
    assert not set(PALETTE[methods:]) & colours


def test_the_size_is_that_asked_for() -> None:
    assert png.render(figure(comparison(2, 2, True)), 2).size == (2400, 1600)


def test_all_right_and_all_wrong_can_be_drawn() -> None:
    cells = [
        Result(name, cr, cr, (1,), {"all": right}, {"all": 50}, 0, "", 9, {p: [1.0] for p in PARTS})
        for name, cr, right in (("none", 1, 50), ("a", 2, 50), ("b", 2, 0))
    ]
    setup = {"model": "demo", "questions": 50, "timing": {"rounds": 1}}
    assert png.render(figure(Comparison(setup, tuple(cells)))).size == (1200, 800)


POINTS = st.tuples(st.floats(100, 900), st.floats(100, 500))


@settings(max_examples=30, deadline=None)
@given(st.lists(POINTS, min_size=1, max_size=12))
def test_names_do_not_cover_each_other(ends: list[tuple[float, float]]) -> None:
    room = Box(0, 0, 1000, 600)
    names = [(80.0, 20.0, end) for end in ends]
    boxes = placed(names, [[end, (end[0] + 50, 50.0)] for end in ends], room)
    for box in boxes:
        assert box.overlap(room) == pytest.approx(80 * 20)
    for one, other in combinations(boxes, 2):
        assert one.overlap(other) == pytest.approx(0, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.lists(POINTS, max_size=12))
def test_names_in_a_column_stand_in_the_order_of_their_ends(
    ends: list[tuple[float, float]],
) -> None:
    room = Box(0, 50, 1000, 500)
    boxes = column([(60.0, 20.0, end) for end in ends], room)
    for box in boxes:
        assert box.overlap(room) == pytest.approx(60 * 20)
        assert box.right < min(x for x, _ in ends)
    for (one, first), (other, second) in combinations(zip(boxes, ends, strict=True), 2):
        assert one.overlap(other) == pytest.approx(0, abs=1e-6)
        assert (one.top < other.top) == (first[1] < second[1]) or first[1] == second[1]


def test_values_are_spread_no_more_than_they_must() -> None:
    assert spread([10, 50, 90], 20, 0, 100) == [10, 50, 90]
    assert spread([50, 50], 20, 0, 100) == pytest.approx([40, 60])
    assert spread([0, 3, 90, 99], 20, 0, 100) == pytest.approx([0, 20, 80, 100])


def test_a_name_stands_left_of_its_line_where_nothing_is() -> None:
    (box,) = placed([(80.0, 20.0, (500.0, 300.0))], [[(500, 300), (600, 200)]], Box(0, 0, 999, 999))
    assert (box.right, box.top + 10) == pytest.approx((488, 300))


def test_the_part_of_a_line_in_a_box() -> None:
    box = Box(10, 10, 20, 10)
    assert box.within((0, 15), (100, 15)) == pytest.approx(20)
    assert box.within((20, 0), (20, 15)) == pytest.approx(5)
    assert box.within((0, 0), (100, 0)) == 0
    assert box.within((10, 10), (20, 20)) == pytest.approx(200**0.5)
    assert box.within((0, 40), (40, 0)) == pytest.approx(200**0.5)


@given(st.floats(0.01, 1000), st.floats(1.05, 200))
def test_numbers_stand_over_the_whole_of_an_axis(low: float, factor: float) -> None:
    """Nowhere is there more than half of the axis without one, nor two too near each other."""
    high, most = low * factor, 26
    at = [math.log(value / low) / math.log(factor) for value in ticks(low, high, most)]
    assert all(0 <= place <= 1 for place in at)
    gaps = [after - before for before, after in pairwise([0, *at, 1])]
    assert max(gaps) <= 0.5
    assert min(gaps[1:-1], default=1) >= 0.999 / most


def test_an_axis_to_18_milliseconds_has_a_number_above_10() -> None:
    assert ticks(2, 18.5, 26) == [2, 2.5, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 18]
