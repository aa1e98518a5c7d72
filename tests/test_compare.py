"""`edgeprune compare`: cells, questions, what is stored, and the run that puts them together."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Refused
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgeprune import recipe as recipes
from edgeprune.bundle import MANIFEST, Bundle
from edgeprune.cli import main
from edgeprune.compare import bundles
from edgeprune.compare.answers import EvalRequest, EvalResult, difference, wilson
from edgeprune.compare.cells import Cell, grid
from edgeprune.compare.comparing import CompareRequest, answers, compare
from edgeprune.compare.questions import Questions
from edgeprune.compare.results import (
    Comparison,
    Missing,
    Result,
    accuracy_table,
    overview_table,
    time_table,
)
from edgeprune.compare.store import Store, key_of
from edgeprune.compare.timing import TimingRequest
from edgeprune.demo.questions import KINDS, held_out
from edgeprune.errors import EdgepruneError, InputError, SpecError
from edgeprune.export.exporter import Exported
from edgeprune.recipe import Recipe
from edgeprune.runtime import Session
from edgeprune.spec import PruneSpec

ASKED = 24


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
    assert {cell.method for cell in grid(["all"], [2], 1)} == set(recipes.policies.names())


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
def own(tmp_path: Path) -> Path:
    """Three questions of a user's own, the last with two right answers and a kind."""
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (60, 60), colour).save(tmp_path / name)
    records: list[dict[str, object]] = [
        {"image": "a.png", "question": "what color ?", "answer": "red"},
        {"image": "b.png", "question": "what color ?", "answer": " blue "},
        {"image": "b.png", "question": "how many ?", "answer": ["0", 1], "kind": "count"},
    ]
    file = tmp_path / "own.jsonl"
    file.write_text("\n\n".join(map(json.dumps, records)))
    return file


def test_own_questions_are_read_with_their_kinds(own: Path) -> None:
    asked = list(Questions(file=own))
    assert [(q.kind, q.answers) for q in asked] == [
        ("all", ("red",)),
        ("all", ("blue",)),
        ("count", ("0", "1")),
    ]
    assert len(Questions(2, own)) == len(list(Questions(2, own))) == 2
    elsewhere = own.parent / "images"
    elsewhere.mkdir()
    with pytest.raises(
        InputError, match=r"own\.jsonl:1: there is no image at .*--questions-image-dir"
    ):
        list(Questions(file=own, image_dir=elsewhere))


def test_the_fingerprint_is_of_questions_and_images(own: Path) -> None:
    before = Questions(file=own).fingerprint
    assert Questions(file=own).fingerprint == before != Questions(2, own).fingerprint
    Image.new("RGB", (60, 60), "green").save(own.parent / "b.png")
    assert Questions(file=own).fingerprint != before
    assert Questions(8).fingerprint != Questions(9).fingerprint


@pytest.mark.parametrize(
    "line", ["{", "[]", "7", '{"image": "a.png"}', '{"image": 1, "question": "", "answer": ""}']
)
def test_a_line_that_is_no_question_is_refused(line: str, own: Path) -> None:
    own.write_text(line)
    with pytest.raises(InputError, match=r"own\.jsonl:1 is no question"):
        len(Questions(file=own))
    own.write_text("\n")
    with pytest.raises(InputError, match="holds no question"):
        len(Questions(file=own))


@pytest.fixture
def ready(
    demo_dense: Path, demo_utp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., CompareRequest]:
    """Requests on the demo whose bundles, `none` and `utp`, are copied and not made."""
    made = {"none": demo_dense, "utp": demo_utp}

    def make(recipe: Recipe) -> Exported:
        if recipe.spec.method not in made or recipe.spec.cr not in (1, 4):
            return recipes.make(recipe)
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
    asked: list[str] = []

    def ask(self: EvalRequest, path: Path, tick: object) -> EvalResult:
        asked.append(path.name)
        return EvalResult({"color": 1}, {"color": 1}, ["red"], "1", 9, 9)

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
    lines = accuracy_table([result("utp", 4, 180), *draws, result("dart", 4, 190)]).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0] == ["method", "CR", "overall", "color", "count"]
    assert [row[0] for row in cells[2:]] == ["dart", "utp", "random"]
    assert cells[4] == ["random", "4", "55.0 (50.0 to 60.0)", "55.0", "55.0"]
    assert cells[3][2] == "90.0 ± 4.2"
    assert len({len(line) for line in lines}) == 1


def test_a_method_of_which_a_part_is_replaced_is_marked_in_every_table() -> None:
    """CDPruner's and VisionTrim's text branch: no supported checkpoint holds CLIP's text tower."""
    methods = ("none", "cdpruner", "visiontrim variant=paper", "divprune", "was-a-method")
    cells = tuple(result(name, 4, 180) for name in methods)
    found = Comparison({"questions": 200, "model": "m"}, cells)
    for table in (accuracy_table(cells), overview_table(cells), time_table(cells)):
        names = {line.split("|")[1].strip() for line in table.splitlines()[2:]}
        assert names == {
            "none",
            "cdpruner *",
            "visiontrim variant=paper *",
            "divprune",
            "was-a-method",
        }
    text = found.to_markdown()
    assert "\\* A part of the published method is replaced:\n\n- cdpruner: " in text
    assert "- visiontrim: the decoder's text embeddings in place of CLIP's text tower.\n" in text
    rows = list(csv.DictReader(found.to_csv().splitlines()))
    assert [bool(row["stands_in"]) for row in rows] == [False, True, True, False, False]
    plain = Comparison({"questions": 200, "model": "m"}, (result("divprune", 4, 180),))
    assert "replaced" not in plain.to_markdown() and "stands_in" not in plain.to_csv()


def test_an_overview_has_a_row_per_method_and_a_column_per_ratio() -> None:
    draws = [result("random", 4, right, seed) for seed, right in enumerate((120, 100))]
    short = replace(result("fastv", 2, 196), cr=1.9)
    cells = [result("none", 1, 198), result("utp", 4, 180), result("utp", 2, 190), *draws, short]
    lines = overview_table(cells).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [rows[0], *rows[2:]] == [
        ["method", "CR 2", "CR 4"],
        ["none", "99.0 ± 1.6", "99.0 ± 1.6"],
        ["utp", "95.0 ± 3.1", "90.0 ± 4.2"],
        ["fastv", "98.0 ± 2.1 at 1.9", "-"],
        ["random", "-", "55.0 (50.0 to 60.0)"],
    ]
    setup = {"questions": 200, "model": "m"}
    assert overview_table(cells) in Comparison(setup, tuple(cells)).to_markdown()
    one = Comparison(setup, (result("utp", 4, 180),))
    assert "CR 4" not in one.to_markdown(), "one ratio needs no overview"


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


def test_keys_tell_apart_what_differs() -> None:
    keys = {key_of(*parts) for parts in ((), (1,), ("1",), (1, 2), ([1, 2],), ({"a": 1},))}
    assert len(keys) == 6
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
