"""Results of a comparison: intervals, files and tables."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune import policies
from edgeprune.compare import result_tables
from edgeprune.compare.results import Comparison, Missing, Result
from edgeprune.intervals import difference, wilson


@settings(deadline=None)
@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_ends_of_an_interval_are_1_96_deviations_from_the_share(count: tuple[int, int]) -> None:
    right, asked = count
    low, high = wilson(right, asked)
    assert 0 <= low <= right / asked <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            deviation = math.sqrt(end * (1 - end) / asked)
            assert abs(right / asked - end) == pytest.approx(1.96 * deviation, rel=1e-6)


def test_a_difference_counts_what_one_alone_got_right() -> None:
    base, other = "1111" * 25, "1110" * 20 + "0111" * 5
    found, half = difference(other, base)
    pairs = np.array([int(a) - int(b) for a, b in zip(other, base, strict=True)])
    assert found == pytest.approx(pairs.mean())
    assert half == pytest.approx(1.96 * pairs.std() / 10)
    assert difference(base, base) == (0, 0)


def result(method: str, cr: float, right: int, seed: int = 0) -> Result:
    asked = {"color": 100, "count": 100}
    rounds = {part: [3.0, 1.0, 2.0] for part in ("vision", "prefill", "decode")}
    counts, half = (8, 4), right // 2
    return Result(
        method, cr, cr, counts, {"color": right - half, "count": half}, asked, seed, "h", 9, rounds
    )


def test_results_survive_json_and_csv() -> None:
    cells = (result("none", 1, 190), result("utp ure=off", 4, 180), result("random", 4, 120, 1))
    setup = {"questions": 200, "model": "demo"}
    found = Comparison(setup, cells, (Missing("vtw", 8, "no, because"),))
    assert Comparison.from_json(found.to_json()) == found
    rows = list(csv.DictReader(found.to_csv().splitlines()))
    assert [row["method"] for row in rows] == ["none", "utp ure=off", "random", "vtw"]
    assert rows[1]["right"] == "180" and rows[1]["accuracy"] == "0.9"
    assert float(rows[1]["low"]) == pytest.approx(wilson(180, 200)[0], abs=1e-5)
    assert float(rows[1]["count high"]) == pytest.approx(wilson(90, 100)[1], abs=1e-5)
    assert rows[1]["prefill ms"] == "2.0"
    assert rows[3]["why_missing"] == "no, because" and rows[3]["right"] == ""


def test_draws_share_a_row_and_the_best_comes_first() -> None:
    draws = [result("random", 4, right, seed) for seed, right in enumerate((120, 100, 110))]
    cells = [result("utp", 4, 180), *draws, result("dart", 4, 190)]
    lines = result_tables.accuracy(cells, "").markdown().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert rows[0] == ["method", "CR", "overall", "color", "count"]
    assert [row[0] for row in rows[2:]] == ["dart", "utp", "random"]
    assert rows[4] == ["random", "4", "55.0 (50.0 to 60.0)", "55.0", "55.0"]
    assert rows[3][2] == "90.0 ± 4.2"
    assert len({len(line) for line in lines}) == 1


def test_a_method_of_which_a_part_is_replaced_is_marked_in_every_table() -> None:
    """CDPruner's and VisionTrim's text branch: no supported checkpoint holds CLIP's text tower."""
    names = ("none", "cdpruner", "visiontrim variant=paper", "divprune")
    cells = tuple(
        replace(result(name, 4, 180), stands_in=policies.load(name.partition(" ")[0]).stands_in)
        for name in names
    )
    found = Comparison({"questions": 200, "model": "m"}, cells)
    starred = {"none", "cdpruner *", "visiontrim variant=paper *", "divprune"}
    tables = [*found.tables(), result_tables.overview(cells, "")]
    assert [{row[0] for row in table.rows} for table in tables] == [starred] * 3
    text = found.to_markdown()
    assert "\\* A part of the published method is replaced:\n\n- cdpruner: " in text
    assert "- visiontrim: the decoder's text embeddings in place of CLIP's text tower.\n" in text
    rows = list(csv.DictReader(found.to_csv().splitlines()))
    assert [bool(row["stands_in"]) for row in rows] == [False, True, True, False]
    plain = Comparison({"questions": 200, "model": "m"}, (result("divprune", 4, 180),))
    assert "replaced" not in plain.to_markdown() and "stands_in" not in plain.to_csv()


def test_formats_of_weights_are_beside_each_other() -> None:
    cells = [result("none", 1, 198), result("utp", 4, 180)]
    cells += [replace(cell, weights="int4", weight_bytes=2_000_000) for cell in cells]
    found = Comparison({"questions": 200, "model": "m"}, tuple(cells))
    lines = (line.split("|")[1:-1] for line in found.to_markdown().splitlines())
    rows = [[cell.strip() for cell in line] for line in lines]
    formats = {row[0]: row for row in rows if len(row) == 4}
    assert formats["method"] == ["method", "CR", "float", "int4"]
    assert formats["none"][2].startswith("99.0 ± 1.6, ")
    assert formats["none"][3].endswith("2.0 MB")
    marked = [
        replace(result("none", 1, 198), marks="1" * 198 + "00"),
        replace(result("none", 1, 196), marks="000" + "1" * 196 + "0", weights="int4"),
    ]
    told = Comparison({"questions": 200, "model": "m"}, tuple(marked)).to_markdown()
    assert " (-1.0 ± 2.0), " in told  # 3 lost, 1 won
    assert {"none", "none int4", "utp", "utp int4"} <= {row[0] for row in rows if len(row) > 4}
    table = csv.DictReader(found.to_csv().splitlines())
    assert [row["weights"] for row in table] == ["float", "float", "int4", "int4"]


def test_tiles_are_below_each_other() -> None:
    marks = "1" * 198 + "00", "0" * 8 + "1" * 190 + "10"
    cells = [
        replace(result("none", 1, right), marks=own, tiles=tiles)
        for right, own, tiles in zip((198, 191), marks, (None, 2), strict=True)
    ]
    cells += [result("utp", 4, 180), replace(result("utp", 4, 170), tiles=2)]
    found = Comparison({"questions": 200, "model": "m"}, tuple(cells))
    table = next(t for t in found.tables() if t.heads[0] == "tiles")
    assert table.heads == ("tiles", "none", "utp CR 4")
    (every, none, _), (two, fewer, pruned) = table.rows
    assert (every, two) == ("all", "2")
    assert none.startswith("99.0 ± 1.6, ") and " tokens" in none
    assert fewer.startswith("95.5 ± 3.0 (-3.5 ± 2.9), "), "8 lost, 1 won"
    assert pruned.startswith("85.0 ± ")
    rows = list(csv.DictReader(found.to_csv().splitlines()))
    assert [row["tiles"] for row in rows] == ["all", "2", "all", "2"]
    assert Comparison.from_json(found.to_json()) == found
    titles = {row[0] for t in found.tables() if t.heads[0] == "method" for row in t.rows}
    assert titles == {"none", "none tiles=2", "utp", "utp tiles=2"}


def test_an_overview_has_a_row_per_method_and_a_column_per_ratio() -> None:
    draws = [result("random", 4, right, seed) for seed, right in enumerate((120, 100))]
    short = replace(result("fastv", 2, 196), cr=1.9)
    cells = [result("none", 1, 198), result("utp", 4, 180), result("utp", 2, 190), *draws, short]
    lines = result_tables.overview(cells, "").markdown().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [rows[0], *rows[2:]] == [
        ["method", "CR 2", "CR 4"],
        ["none", "99.0 ± 1.6", "99.0 ± 1.6"],
        ["utp", "95.0 ± 3.1", "90.0 ± 4.2"],
        ["fastv", "98.0 ± 2.1 at 1.9", "-"],
        ["random", "-", "55.0 (50.0 to 60.0)"],
    ]
    setup = {"questions": 200, "model": "m"}
    assert (
        result_tables.overview(cells, "").markdown()
        in Comparison(setup, tuple(cells)).to_markdown()
    )
    one = Comparison(setup, (result("utp", 4, 180),))
    assert "CR 4" not in one.to_markdown(), "one ratio needs no overview"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"right": {"color": 101, "count": 1}}, "more right answers"),
        ({"asked": {"color": 100}}, "other kinds"),
        ({"rounds": {"prefill": [1.0]}}, "lacks times"),
    ],
)
def test_results_that_contradict_themselves_are_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        replace(result("utp", 4, 180), **changes)


def test_results_of_others_are_checked_by_type_and_range() -> None:
    good = Comparison({"questions": 200, "model": "m"}, (result("utp", 4, 180),)).to_json()
    for wrong in (good.replace('"cr": 4', '"cr": 0'), good.replace("[8, 4]", '["8"]'), "[]"):
        with pytest.raises((ValueError, TypeError), match="comparison"):
            Comparison.from_json(wrong)
