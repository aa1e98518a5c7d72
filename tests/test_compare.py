"""`edgeprune compare`: cells, questions, what is stored, and the run that puts them together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Refused
from PIL import Image

from edgeprune import making, policies
from edgeprune.bundle import MANIFEST, Bundle
from edgeprune.cli import main
from edgeprune.compare import bundles
from edgeprune.compare.answers import EvalRequest, EvalResult
from edgeprune.compare.cells import Cell, grid
from edgeprune.compare.comparing import CompareRequest, answers, compare
from edgeprune.compare.questions import Questions
from edgeprune.compare.results import (
    Comparison,
    Missing,
)
from edgeprune.compare.store import Store
from edgeprune.compare.timing import TimingRequest
from edgeprune.demo.questions import KINDS, held_out
from edgeprune.errors import EdgepruneError, SpecError
from edgeprune.export.exporter import Exported
from edgeprune.recipe import Recipe
from edgeprune.runtime import Session
from edgeprune.spec import PruneSpec

ASKED = 24


def test_the_grid_has_the_dense_model_once_and_draws_several_times() -> None:
    cells = grid(["none", "fastv:K=1", "random"], [2, 4], seeds=2)
    assert [cell.name for cell in cells] == [
        "none-cr1",
        "fastv-K=1-cr2",
        "random-cr2",
        "random-cr2-seed1",
        "fastv-K=1-cr4",
        "random-cr4",
        "random-cr4-seed1",
    ]
    assert cells[1].label == "fastv K=1"
    assert cells[1].spec == PruneSpec("fastv", 2, 0, {"K": "1"})
    assert {cell.method for cell in grid(["all"], [2], 1)} == set(policies.names())


def test_formats_of_weights_are_an_axis_of_the_grid() -> None:
    cells = grid(["fastv"], [2], 1, ["float", "int4:block=64", "float"])
    assert [(cell.name, cell.title) for cell in cells] == [
        ("none-cr1", "none"),
        ("fastv-cr2", "fastv"),
        ("none-int4_block=64-cr1", "none int4:block=64"),
        ("fastv-int4_block=64-cr2", "fastv int4:block=64"),
    ]
    with pytest.raises(SpecError, match="one of float, int8, int4, fp8, auto; got 'int5'"):
        grid(["fastv"], [2], 1, ["int5"])


def test_numbers_of_tiles_are_an_axis_of_the_grid() -> None:
    cells = grid(["fastv"], [2], 1, tiles=[None, 3, 3])
    assert [(cell.name, cell.title, cell.tiles) for cell in cells] == [
        ("none-cr1", "none", None),
        ("fastv-cr2", "fastv", None),
        ("none-tiles=3-cr1", "none tiles=3", 3),
        ("fastv-tiles=3-cr2", "fastv tiles=3", 3),
    ]


def test_tiles_that_are_no_numbers_are_refused(tmp_path: Path, refused: Refused) -> None:
    said = refused("compare", "--tiles", "all,two", "-o", tmp_path / "c")
    assert "--tiles takes numbers or all with commas between, as all,4,2; got 'all,two'" in said


@pytest.mark.parametrize(
    ("methods", "cr", "seeds", "says"),
    [
        (["nosuch"], 2, 1, "no method 'nosuch'"),
        (["fastv:Q=1"], 2, 1, "no option 'Q'"),
        (["fastv:K"], 2, 1, "METHOD:NAME=VALUE; got 'fastv:K'"),
        (["utp"], 0.5, 1, "at least 1; got 0.5"),
        (["random"], 2, 0, "--seeds is at least 1"),
    ],
)
def test_a_wrong_cell_is_refused_before_any_work(
    methods: list[str], cr: float, seeds: int, says: str
) -> None:
    with pytest.raises(SpecError, match=says):
        grid(methods, [cr], seeds)


def test_what_is_stored_is_found_under_its_key_alone(tmp_path: Path) -> None:
    store = Store(tmp_path / "cells")
    assert store.read("a", "k") is None
    store.write("a", "k", {"x": 1})
    assert store.read("a", "k") == {"x": 1}
    assert store.read("a", "other") is None
    file = tmp_path / "cells" / "a.json"
    assert [f.name for f in file.parent.iterdir()] == ["a.json"], "no draft is left"
    for damaged in (b"", b"[]", b"\xff", file.read_bytes()[:-3], b'{"key": "k"}'):
        file.write_bytes(damaged)
        assert store.read("a", "k") is None


def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    store.write("a", "k", {"x": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(SpecError, match=r"a\.json cannot be written \(No space left on device\)"):
        store.write("a", "k", {"x": 2})
    assert store.read("a", "k") == {"x": 1}
    assert [f.name for f in tmp_path.iterdir()] == ["a.json"]


@pytest.fixture
def ready(
    demo_dense: Path, demo_utp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., CompareRequest]:
    """Requests on the demo whose bundles, `none` and `utp`, are copied and not made."""
    made = {"none": demo_dense, "utp": demo_utp}

    def make(recipe: Recipe) -> Exported:
        if recipe.spec.method not in made or recipe.spec.cr not in (1, 4):
            return making.make(recipe)
        folder = Path(shutil.copytree(made[recipe.spec.method], recipe.folder))
        return Exported(folder, Bundle.open(folder, verify=False).manifest)

    monkeypatch.setattr(bundles, "make", make)
    base = CompareRequest(
        folder=tmp_path / "compared",
        cells=tuple(grid(["none", "utp"], [4], 1)),
        recipe=Recipe(PruneSpec("none")),
        evaluation=EvalRequest(Questions(ASKED)),
        timing=TimingRequest(rounds=2, new_tokens=2, threads=1),
    )
    return lambda **changes: replace(base, **changes)


def never(*_: object, **__: object) -> None:
    raise AssertionError("this was done before")


def test_a_comparison_counts_what_bundles_answer(
    ready: Callable[..., CompareRequest], demo_utp: Path
) -> None:
    steps: list[tuple[str, int, int]] = []
    request = ready()
    found = compare(request, lambda *step: steps.append(step))
    dense, utp = found.cells
    assert (dense.method, utp.method, utp.cr_asked, utp.cr) == ("none", "utp", 4, 4)
    session = Session.open(demo_utp, threads=1)
    right = dict.fromkeys(KINDS, 0)
    for image, question in held_out(ASKED):
        right[question.kind] += session.ask(image, question.text).text == question.answer
    assert utp.right == right
    assert utp.asked == dict.fromkeys(KINDS, ASKED // len(KINDS))
    assert utp.counts == session.manifest.prune.counts
    assert 3 * utp.kv_bytes < dense.kv_bytes, "the prompt's own tokens are counted too"
    for cell in found.cells:
        assert {part: len(rounds) for part, rounds in cell.rounds.items()} == {
            "vision": 2,
            "prefill": 2,
            "decode": 2,
        }
        assert all(min(rounds) > 0 for rounds in cell.rounds.values())
    stored = answers(request)
    assert [marks.marks.count("1") for marks in stored.values()] == [
        c.total[0] for c in found.cells
    ]
    assert ("questions", 2 * ASKED, 2 * ASKED) in steps
    assert not (request.folder / "bundles").exists()


def test_a_second_run_does_what_is_missing_alone(
    ready: Callable[..., CompareRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = ready(timing=None, keep_bundles=True)
    first = compare(request)
    assert (request.folder / "bundles" / "utp-cr4" / MANIFEST).is_file()
    with monkeypatch.context() as patch:
        patch.setattr(EvalRequest, "ask", never)
        patch.setattr(bundles, "make", never)
        assert compare(request) == first
    (request.folder / "cells" / "utp-cr4.answers.json").unlink()
    asked, kinds = list[str](), first.cells[0].asked

    def ask(self: EvalRequest, path: Path, tick: object) -> EvalResult:
        asked.append(path.name)
        return EvalResult(kinds, kinds, ["red"], "1" * sum(kinds.values()), 9, 9)

    with monkeypatch.context() as patch:
        patch.setattr(EvalRequest, "ask", ask)
        patch.setattr(bundles, "make", never)
        compare(request)
    assert asked == ["utp-cr4"]
    more = replace(request, evaluation=EvalRequest(Questions(ASKED + 1)))
    assert all(sum(cell.asked.values()) == ASKED + 1 for cell in compare(more).cells)


def test_a_bundle_made_again_to_the_same_bytes_is_not_asked_again(
    ready: Callable[..., CompareRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = ready(timing=None)
    first = compare(request)
    for file in (request.folder / "cells").glob("*.bundle.json"):
        file.unlink()
    monkeypatch.setattr(EvalRequest, "ask", never)
    assert compare(request) == first


def test_what_cannot_be_and_what_fails_are_told_apart(
    ready: Callable[..., CompareRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = tuple(grid(["fastv", "utp"], [8, 4], 1))
    request = ready(cells=tuple(c for c in cells if c.name in ("none-cr1", "fastv-cr8", "utp-cr4")))

    def ask(self: EvalRequest, path: Path, tick: object) -> EvalResult:
        if path.name == "utp-cr4":
            raise EdgepruneError("the disk\nis full")
        return EvalResult({"color": 1}, {"color": 1}, ["red"], "1", 9, 9)

    with monkeypatch.context() as patch:
        patch.setattr(EvalRequest, "ask", ask)
        told: list[str] = []
        found = compare(request, tell=told.append)
    assert told == ["utp-cr4 failed: the disk is full"]
    assert (request.folder / "bundles" / "none-cr1").is_dir(), "the next run times it again"
    assert [cell.method for cell in found.cells] == ["none"]
    assert found.failed == (Missing("utp", 4, "the disk is full"),)
    (unreachable,) = found.out_of_reach
    assert unreachable.method == "fastv"
    assert "so --cr is at most 5.79, not 8" in unreachable.why
    assert "fastv  | 8        | method fastv keeps" in found.to_markdown()
    monkeypatch.setattr(bundles.Bundles, "_make", never)
    again = compare(replace(request, cells=(cells[0], Cell("fastv", 8.0))))
    assert again.out_of_reach == found.out_of_reach, "the reason is stored too"


def test_the_command_on_a_user_s_own_model_and_questions(
    tiny_checkpoint: Path, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Questions and calibration samples each have a folder of images of their own."""
    folder, asked, learned = tmp_path / "out", tmp_path / "asked", tmp_path / "learned"
    for images in (asked, learned):
        images.mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / name).rename(asked / name)
    Image.new("RGB", (60, 60), "green").save(learned / "c.png")
    turns = [{"from": "human", "value": "what color ?"}]
    (samples := tmp_path / "samples.json").write_text(
        json.dumps([{"image": "c.png", "conversations": turns}] * 4)
    )
    command = ["compare", "--model", tiny_checkpoint, "--methods", "uniform,vtw,utp", "--cr", "2"]
    command += ["--questions-file", own, "--questions-image-dir", asked]
    command += ["--samples-file", samples, "--image-dir", learned]
    command += ["--jobs", 1, "--rounds", 1, "-o", folder]
    assert main([str(word) for word in command]) == 0
    table = capsys.readouterr().out
    assert (folder / "compare.md").read_text() == table
    assert "3 questions each to tiny" in table
    assert "vtw    | 2        | method vtw drops all visual tokens" in table
    found = Comparison.from_json((folder / "compare.json").read_text())
    assert [cell.method for cell in found.cells] == ["none", "uniform", "utp"]
    assert found.cells[0].asked == {"all": 2, "count": 1}
    with Image.open(folder / "compare.png") as image:
        assert image.size == (1200, 800)
    assert {f.name for f in folder.iterdir()} == {
        "cells",
        *(f"compare.{kind}" for kind in ("json", "csv", "md", "png", "svg")),
    }


def test_requests_that_cannot_be_met(refused: Refused, tmp_path: Path) -> None:
    base = ["compare", "-o", tmp_path / "out"]
    assert "no method 'nosuch'" in refused(*base, "--methods", "nosuch")
    assert "--cr takes numbers" in refused(*base, "--cr", "2;4")
    assert "--jobs is at least 1" in refused(*base, "--jobs", "0")
    assert "--questions is at least 1" in refused(*base, "--questions", "0")
    assert "--rounds is at least 1" in refused(*base, "--rounds", "-1")
    assert "--max-new-tokens is at least 1" in refused(*base, "--max-new-tokens", "0")
    assert "no backend 'abacus'" in refused(*base, "--backend", "abacus")
    assert "asks on ort-cpu or ort-cuda; got trt-rtx" in refused(*base, "--backend", "trt-rtx")
    assert "--dtype is one of" in refused(*base, "--dtype", "fp7")
    assert "runs fp32, fp16, not bf16" in refused(*base, "--dtype", "bf16")
    assert "nosuch.jsonl cannot be read" in refused(*base, "--questions-file", "nosuch.jsonl")
    for alone in ("--questions-image-dir", "--image-dir"):
        assert f"{alone} is the folder of" in refused(*base, alone, tmp_path)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").write_text("a file")
    assert "out/compare.json cannot be written" in refused(*base, "--methods", "none")
