"""`--set counts=`: a method's published budgets, in place of a ratio."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Refused

from edgeprune import policies
from edgeprune.bundle import Bundle
from edgeprune.cli import main
from edgeprune.compare.cells import grid
from edgeprune.errors import SpecError
from edgeprune.spec import ModelShape, Plan, PruneSpec

SEVEN = ModelShape(
    "llava", 576, (24, 24), 32, 4096, 11008, 32, 32, 128, 32064, 4096, True, blocks=23
)
RATIO_ONLY = {"none", "utp", "vtw"}
"""One prunes nothing, one follows a schedule, one drops all after a layer that the ratio names."""


def plan(method: str, counts: str, **options: str) -> Plan:
    spec = PruneSpec(method, options={"counts": counts, **options})
    return policies.make(spec).plan(SEVEN, spec.cr)


@pytest.mark.parametrize(
    ("counts", "kept", "merged"),
    [
        ("309/204/113", [300, 200, 110], [9, 4, 3]),
        ("312/117/39", [303, 110, 36], [9, 7, 3]),
        ("82/32/18", [66, 30, 17], [16, 2, 1]),
    ],
)
def test_sparsevlm_has_its_released_lists(counts: str, kept: list[int], merged: list[int]) -> None:
    """@192, @128 and @64: what the released code keeps, and the clusters that it adds to that."""
    stages = plan("sparsevlm", counts).stages
    assert [(s.layer, s.keep, s.merged) for s in stages] == list(
        zip((4, 8, 17), kept, merged, strict=True)
    )
    assert [s.keep for s in plan("sparsevlm", "300/200/118", version="2").stages] == [300, 200, 118]


@pytest.mark.parametrize(
    ("method", "counts", "options", "wanted"),
    [
        ("pyramiddrop", "288/144/72", {}, [(8, 576), (8, 288), (8, 144), (8, 72)]),
        ("pyramiddrop", "110/21/4", {"stages": "2,8,16"}, [(2, 576), (6, 110), (8, 21), (16, 4)]),
        ("fastv", "128", {}, [(2, 576), (30, 128)]),
        ("dart", "128", {"K": "3"}, [(3, 576), (29, 128)]),
        ("llavolta", "115", {}, [(2, 576), (30, 115)]),
        ("polymorphic", "384/272/192/136", {}, [(3, 384), (4, 272), (9, 192), (16, 136)]),
        ("visiontrim", "192/96", {"llm": "16"}, [(16, 192), (16, 96)]),
        *((name, "64", {}, [(32, 64)]) for name in ("fastervlm", "visionzip", "vispruner")),
        *((name, "64", {}, [(32, 64)]) for name in ("cdpruner", "divprune", "trimtokenator")),
        *((name, "64", {}, [(32, 64)]) for name in ("prumerge", "prumergeplus", "visiontrim")),
        *((name, "64", {}, [(32, 64)]) for name in ("tome", "random", "uniform")),
    ],
)
def test_layers_are_entered_by_the_tokens_listed(
    method: str, counts: str, options: dict[str, str], wanted: list[tuple[int, int]]
) -> None:
    found = plan(method, counts, **options)
    assert found.counts == tuple(n for layers, n in wanted for _ in range(layers))


def test_visionzip_splits_a_count_as_published() -> None:
    for counts, kept, merged in (("192", 162, 30), ("128", 108, 20), ("64", 54, 10)):
        (stage,) = plan("visionzip", counts).stages
        assert (stage.keep, stage.merged) == (kept, merged)


@pytest.mark.parametrize("name", policies.names())
def test_every_method_with_a_budget_takes_counts(name: str) -> None:
    spec = PruneSpec(name, options={"counts": "5"})
    assert spec.exact
    if name in RATIO_ONLY:
        with pytest.raises(SpecError, match="has no option 'counts'"):
            policies.make(spec)
    else:
        policies.make(spec)


@pytest.mark.parametrize("counts", ["", "309", "309/204/0", "309/204/113/9", "300/400/1", "9/x/1"])
def test_counts_that_cannot_be_are_refused(counts: str) -> None:
    with pytest.raises(SpecError, match=r"takes 3 numbers with / between, such as 288/144/72: .*"):
        plan("sparsevlm", counts)


def test_the_ratio_follows(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["export", "--model", str(tiny_checkpoint), "--method", "fastv", "--set", "K=1"]
    assert main([*command, "--set", "counts=7", "--parity", "1"]) == 0
    prune = Bundle.open(Path("out/tiny-fastv-cr1.6")).manifest.prune
    assert prune.counts == (16, 7, 7)
    assert prune.cr == prune.cr_reached == pytest.approx(1.6)
    said = refused(*command, "--set", "counts=7", "--cr", "4")
    assert "counts=7 reaches CR 1.6, --cr asks for 4; leave out --cr" in said


def test_a_comparison_has_given_counts_once() -> None:
    cells = grid(["fastv:counts=9", "divprune"], [2, 4], 1)
    assert [(cell.method, cell.cr) for cell in cells] == [
        ("none", 1),
        ("fastv", 1),
        ("divprune", 2),
        ("divprune", 4),
    ]
