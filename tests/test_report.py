"""The page of a report: what it says, that it stands alone, that nothing of others is markup."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from edgeprune.bench.bench import Absent, BenchResult
from edgeprune.bundle import MANIFEST, Bundle
from edgeprune.cli import main
from edgeprune.compare.results import Comparison, Missing, Result
from edgeprune.drawing import svg
from edgeprune.intervals import difference, wilson
from edgeprune.measured import DistanceRecord, WeightsRecord
from edgeprune.report import html, proof, sections
from edgeprune.report.evaluation import Evaluation, TaskScore
from edgeprune.report.html import join
from edgeprune.report.page import Heading, render
from edgeprune.report.sources import read
from edgeprune.tables import Table
from tests.conftest import Refused
from tests.test_bench import row

EVIL = '</td><script>alert(1)</script>"><img src=x onerror=alert(2)>\x1b[31m\u202e'
MARKS = {"none": "1111111110", "utp": "1111111000", EVIL: "1100000000"}
LMMS = {
    "results": {
        "gqa": {"alias": "gqa", "exact_match,none": 0.5, "exact_match_stderr,none": 0.01},
        "mme": {"alias": "mme", "score,none": 1432.1, "score_stderr,none": "N/A"},
    },
    "configs": {},
    "n-samples": {"gqa": {"original": 90, "effective": 40}},
    "config": {"model": "edgeprune", "model_args": "bundle=out/B"},
}


class Page(HTMLParser):
    """Cells of all tables, text, and every element with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.said = ""
        self.feed(text)
        assert not self.open, "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.said += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def compared() -> Comparison:
    def one(method: str, cr: float, speed: float) -> Result:
        marks, rounds = MARKS[method], {p: [6 / speed, 8 / speed] for p in ("vision", "prefill")}
        return Result(
            method,
            cr,
            cr,
            (8, 8),
            {EVIL: marks.count("1")},
            {EVIL: len(marks)},
            kv_bytes=int(80_000 / cr),
            rounds={**rounds, "decode": [2.0, 2.0]},
            stands_in=EVIL if method == EVIL else "",
            marks=marks,
        )

    cells = one("none", 1, 1), one("utp", 4, 2), one(EVIL, 4, 4)
    setup = {"model": EVIL, "questions": 10, "machine": {EVIL: EVIL}}
    return Comparison(setup, cells, (Missing(EVIL, 8, EVIL),))


@pytest.fixture
def folder(tmp_path: Path, tiny_jetpack7: Path) -> Path:
    """A bundle's manifest and a result of each kind; every text that can be is hostile."""
    root = tmp_path / "results"
    (root / "bundle").mkdir(parents=True)
    manifest = Bundle.open(tiny_jetpack7).manifest
    named = replace(manifest, name=EVIL, model=EVIL, versions={EVIL: EVIL, "torch": "2.13"})
    (root / "bundle" / MANIFEST).write_text(named.to_json())
    (root / "compare.json").write_text(compared().to_json())
    rows = row("dense", "ort-cpu", 1), row(EVIL, "ort-cpu", 2, joules=(3.5, 3.5), meter=EVIL)
    request: dict[str, Any] = {"bundles": [EVIL], "text_tokens": 64, "new_tokens": 8}
    timed = BenchResult(rows, (Absent(EVIL, "trt", EVIL),), (), request, {"gpu": EVIL})
    (root / "bench.json").write_text(timed.to_json())
    (root / "run_results.json").write_text(json.dumps(LMMS))
    return root


def test_a_page_says_what_the_files_say(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    assert main(["report", str(folder), "-o", str(out), "--title", "For <you>"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    page = Page(out.read_text(encoding="utf-8"))
    assert "For <you>" in page.said
    change, half = difference(MARKS["utp"], MARKS["none"])
    low, high = wilson(7, 10)
    share, said = f"70.0 ± {50 * (high - low):.1f}", f"{100 * change:+.1f} ± {100 * half:.1f}"
    assert ["4", "utp", share, said, "2.00", "1.00", "25% of dense"] in page.rows
    assert ["gqa", "exact_match", "0.5 ± 0.02", "40", "edgeprune", "bundle=out/B"] in page.rows
    assert ["mme", "score", "1432", "-", "edgeprune", "bundle=out/B"] in page.rows
    assert any(r[0] == "dense" and "15.00" in " ".join(r) for r in page.rows), "median, 2 rounds"
    assert [r[1] for r in page.rows if r[0] == "results/compare.json"] == ["compare"]
    assert {r[1] for r in page.rows if r[0].startswith("results/")} == {
        "bundle",
        "compare",
        "bench",
        "lmms-eval",
    }


def test_nothing_of_others_is_markup_and_nothing_is_loaded(folder: Path) -> None:
    text = render(read([folder]), Heading())
    page = Page(text)
    assert {"script", "img", "link", "iframe", "object"}.isdisjoint(t for t, _ in page.elements)
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        assert str(attributes.get("href", "#")).startswith("#")
        assert "src" not in attributes
    assert "url(" not in text and "@import" not in text
    assert "\x1b" not in text and "\u202e" not in text
    assert r"<script>alert(1)</script>" in page.said, "it is shown, as text"
    assert any("default-src 'none'" in str(a.get("content")) for _, a in page.elements)


def test_tables_and_figures_can_be_read_aloud(folder: Path) -> None:
    page = Page(render(read([folder]), Heading()))
    tags = [tag for tag, _ in page.elements]
    assert tags.count("caption") == tags.count("table") > 8
    scopes = [attributes.get("scope") for tag, attributes in page.elements if tag == "th"]
    assert set(scopes) == {"col", "row"}
    figures = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert len(figures) == 3
    assert all(a["role"] == "img" and a["aria-label"] for a in figures)
    assert dict(page.elements)["html"] == {"lang": "en"}


def test_columns_of_numbers_are_set_to_the_right() -> None:
    rows = [
        ["a", "1,234.5 ± 2", "8.4e-07", "-", "12 x", "1.2.3"],
        ["b", "-", "-1", "+0.5", "3", "2"],
    ]
    page = Page(html.table(Table("", list("abcdef"), rows)))
    cells = [attributes.get("class") for tag, attributes in page.elements if tag == "td"]
    assert cells == ["number", "number", "number", "number", "number"] * 2


def test_the_page_sets_every_colour_that_figures_leave_to_it() -> None:
    style = resources.files("edgeprune.report").joinpath("style.css").read_text(encoding="utf-8")
    for role in svg.ROLES.values():
        assert style.count(f"--{role}:") == 3, "light, dark and print"


def test_what_cannot_be_read_is_on_the_page_with_the_reason(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "bundle" / MANIFEST
    file.write_text(file.read_text().replace('"schema": 5', '"schema": 4'))
    (folder / "bench.json").write_text(
        '{"rows": [{}], "absent": [], "agreements": 1, "machine": 2}'
    )
    (folder / "broken.json").write_text("{")
    (folder / "other.json").write_text('{"of": "somebody else"}')
    out = tmp_path / "page.html"
    assert main(["report", str(folder), "-o", str(out)]) == 0
    left = {line.split()[1] for line in capsys.readouterr().err.splitlines()}
    assert left == {f"results/{n}" for n in ("bundle/manifest.json", "bench.json", "broken.json")}
    page = Page(out.read_text(encoding="utf-8"))
    reasons = {r[0]: r[1] for r in page.rows if len(r) == 2}
    assert "export again" in reasons["results/bundle/manifest.json"]
    assert "bench.rows" in reasons["results/bench.json"]
    assert "3 files could not be read" in page.said
    assert "other.json" not in page.said


def test_a_bundle_without_parity_is_said_first(folder: Path) -> None:
    file = folder / "bundle" / MANIFEST
    content = json.loads(file.read_text())
    content["parity"].update(samples=0, why="nobody asked")
    file.write_text(json.dumps(content))
    page = Page(render(read([folder]), Heading()))
    assert "NOT checked for 1 of 1 bundles" in page.said
    assert "NOT checked: nobody asked" in {cell for r in page.rows for cell in r}


def test_what_shortens_the_encoder_and_what_is_rounded_is_told(tiny_jetpack7: Path) -> None:
    found = Bundle.open(tiny_jetpack7).manifest
    encoder = replace(found.encoder, method="exit:at=2:keep=0.5")
    near, far = (DistanceRecord({}, logits, 1.0) for logits in (0.1, 0.2))
    told = {"distance": near, "running": near, "rounded": far}
    weights = WeightsRecord("fp8", "rounding", {"fp8": 1}, 0, 0, 1, 8, 0.1, **told)
    given = [replace(found, encoder=encoder, weights=weights)]
    assert "exit:at=2:keep=0.5" in Page(join(sections.pruned(given))).rows[1]
    rows = {line[1]: line[3] for line in Page(join(proof.parity(given))).rows if len(line) == 5}
    assert rows["weights fp8"] == rows["the same as it runs, activations rounded"] == "0.1"
    assert rows["the same, activations rounded, eager"] == "0.2"


def test_folders_without_results_are_refused(tmp_path: Path, refused: Refused) -> None:
    assert "no manifest.json" in refused("report", tmp_path, "-o", tmp_path / "page.html")
    line = refused("report", tmp_path / "absent", "-o", tmp_path / "page.html")
    assert "absent is no folder" in line
    assert not (tmp_path / "page.html").exists()


def test_a_folder_that_is_named_twice_counts_once(folder: Path) -> None:
    assert read([folder, folder / "bundle"]) == read([folder])


def test_scores_are_read_with_their_errors() -> None:
    assert Evaluation.from_json(json.dumps(LMMS)) == Evaluation(
        "edgeprune",
        "bundle=out/B",
        (
            TaskScore("gqa", "exact_match,none", 0.5, 0.01, 40),
            TaskScore("mme", "score,none", 1432.1, None, None),
        ),
    )
    wrong = json.dumps({**LMMS, "results": {"gqa": {"exact_match,none": 1e300}}})
    with pytest.raises(TypeError, match="exact_match"):
        Evaluation.from_json(wrong)


def test_timings_survive_json() -> None:
    request = {"text_tokens": 64, "new_tokens": 8, "bundles": ["a"]}
    found = BenchResult((row("a", "ort-cpu", 1),), (), (), request, {"gpu": "g"})
    assert BenchResult.from_json(found.to_json()) == found
    content = asdict(found)
    content["rows"][0]["rounds"]["decode"] = [0, 0]
    with pytest.raises(ValueError, match="takes no time"):
        BenchResult.from_json(json.dumps(content))


def test_a_report_needs_no_torch() -> None:
    code = (
        "import sys, edgeprune.report.page\n"
        "print({'torch', 'transformers', 'onnx'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
