"""The README and the guides against the program: what they show is what there is."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from edgeprune import cli, models, policies
from edgeprune.commands import listing
from edgeprune.compare import result_tables
from edgeprune.compare.results import Comparison
from edgeprune.intervals import wilson

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = ROOT / "docs"
FOR_DEVELOPERS = [ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"]
PAGES = [ROOT / "README.md", *FOR_DEVELOPERS, *sorted(DOCS.glob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])


def block(first: str) -> str:
    """The indented block whose first line begins with `first`, unindented."""
    lines = (DOCS / "commands.md").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"    {first}"))
    end = next(i for i in range(start, len(lines)) if lines[i] and not lines[i].startswith("    "))
    return "\n".join(line[4:] for line in lines[start:end]).strip()


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="argparse lays out help anew from 3.13 on")
def test_the_help_shown_is_the_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    shown = block("usage: edgeprune [-h]")
    real = "\n".join(line.rstrip() for line in cli.parser().format_help().splitlines())
    assert shown == real.strip()


@pytest.mark.parametrize(("page", "package"), [("methods", policies), ("models", models)])
def test_every_method_and_family_is_in_its_table(page: str, package: Any) -> None:
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert sorted(rows) == package.names()


@pytest.mark.parametrize("name", policies.names())
def test_a_method_s_row_is_what_the_program_says(name: str) -> None:
    policy = policies.load(name)
    sites = ", ".join(policy.sites) or "-"
    options = ", ".join(f"`{option}`" for option in listing._options(policy)) or "-"
    text = (DOCS / "methods.md").read_text(encoding="utf-8")
    assert f"| `{name}` | {policy.summary} | {sites} | {options} |" in text.splitlines()


@each_page
def test_every_command_shown_parses(page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^    edgeprune (\w+ .*?|\w+)(?: *#.*)?$", text, re.MULTILINE)
    assert commands or page.stem not in ("README", "commands", "jetson-orin", "rtx-pc")
    for command in commands:
        arguments = [a.strip('"') for a in re.findall(r'"[^"]*"|\S+', command)]
        cli.parser().parse_args(arguments)


@each_page
def test_every_file_and_heading_named_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name, heading in re.findall(r"\]\(([\w./-]*)(?:#([\w-]+))?\)", text):
        target = page.parent / name if name else page
        assert target.exists(), name
        assert not heading or heading in _anchors(target), f"{name}#{heading}"
    for module in re.findall(r"python -m (benchmarks\.[\w.]+)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


@pytest.mark.parametrize("page", FOR_DEVELOPERS, ids=[page.stem for page in FOR_DEVELOPERS])
def test_every_source_file_named_exists(page: Path) -> None:
    folders = ("edgeprune", "export", "runtime", "calib", "tests", "benchmarks")
    files = [file.as_posix() for folder in folders for file in (ROOT / folder).rglob("*.py")]
    for name in re.findall(r"`([\w/]+\.py)`", page.read_text(encoding="utf-8")):
        placeholder = Path(name).stem.isupper()  # as in edgeprune/policies/NAME.py
        assert placeholder or any(file.endswith(f"/{name}") for file in files), name


def _anchors(page: Path) -> set[str]:
    """What links to a page's headings say behind the #."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def test_the_accuracy_table_is_the_measured_one() -> None:
    text = (ROOT / "benchmarks/results/compare.json").read_text(encoding="utf-8")
    cells = Comparison.from_json(text).cells
    assert all(sum(cell.asked.values()) >= 2000 for cell in cells)
    table = result_tables.overview(cells, "").markdown()
    assert table in (DOCS / "accuracy.md").read_text(encoding="utf-8")


def test_the_accuracy_in_the_readme_is_the_measured_one() -> None:
    """Each row a method: small details at CR 4 and 16, then the demo at CR 4."""
    cell = r" +\| (-|.* ± \S+)"
    rows = re.findall(rf"^\| (\w+)(?: \*)?{cell}{cell}{cell} +\|$", README, re.MULTILINE)
    assert len(rows) == 5
    small, demo = _measured("scenes576"), _measured("positions") | _measured("")
    for method, four, sixteen, own in rows:
        found = small[method, 4], small.get((method, 16), "-"), demo[method, 4]
        assert (four.strip(), sixteen.strip(), own.strip()) == found, method


def _measured(folder: str) -> dict[tuple[str, float], str]:
    """Accuracy by method and ratio, as tables say it; the dense model's at every ratio."""
    file = ROOT / "benchmarks/results" / folder / "compare.json"
    cells = Comparison.from_json(file.read_text(encoding="utf-8")).cells
    found = {}
    for cell in cells:
        low, high = wilson(*cell.total)
        ratios = (4, 16) if cell.method == "none" else (cell.cr_asked,)
        for ratio in ratios:
            found[cell.method, ratio] = f"{100 * cell.share:.1f} ± {50 * (high - low):.1f}"
    return found


def test_the_table_of_small_details_is_the_measured_one() -> None:
    measured = (ROOT / "benchmarks/results/scenes576/compare.md").read_text(encoding="utf-8")
    accuracy = (DOCS / "accuracy.md").read_text(encoding="utf-8")
    table = accuracy.partition("\n| method ")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(table) == 20
    assert set(table) <= set(measured.splitlines())
