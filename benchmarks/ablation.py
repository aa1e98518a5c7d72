"""UTP taken apart on the demo benchmark, beside what the paper measured when it did so.

    python -m benchmarks.ablation -o out/ablation --json benchmarks/results/ablation.json

What to prune (URE) and where (UTR), each alone and both (the paper's Table 2); where URE puts the
visual tokens (its Tables 3 and 4, without UTR as there). Differences are to the baseline, neither
of both, on the same questions, with 95% intervals of paired differences.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from edgeprune.compare.answers import EvalRequest, EvalResult
from edgeprune.compare.cells import Cell, grid
from edgeprune.compare.comparing import CompareRequest, answers, compare
from edgeprune.compare.questions import HELD_OUT, Questions
from edgeprune.compare.titles import DENSE
from edgeprune.files import write_whole
from edgeprune.intervals import difference
from edgeprune.progress import Bar
from edgeprune.recipe import Recipe
from edgeprune.spec import PruneSpec

BASELINE = "utp:ure=off:utr=off"


@dataclass(frozen=True)
class Variant:
    """One row: what is on, how it is asked for, and the paper's average score for it."""

    name: str
    method: str
    paper: float | None  # LLaVA-1.5-7B at CR 4; percent, MME / 20


PARTS = (
    Variant("neither (FastV)", BASELINE, 60.55),
    Variant("URE", "utp:utr=off", 62.68),
    Variant("UTR", "utp:ure=off", 64.31),
    Variant("URE and UTR", "utp", 65.26),
)
"""Table 2: the mean over its nine benchmarks, as its text has it too: +2.13, +3.76, +4.71."""

POSITIONS = (
    Variant("true positions (FastV)", BASELINE, 60.7),
    Variant("start", "utp:utr=off:position=start", 62.8),
    Variant("middle", "utp:utr=off", 62.8),
    Variant("end", "utp:utr=off:position=end", 61.7),
    Variant("none", "utp:utr=off:position=none", 58.6),
)
"""Tables 3 and 4: the mean over GQA, TextVQA and MME."""

WITH_UTR = (
    Variant("start", "utp:position=start", None),
    Variant("middle", "utp", None),
    Variant("end", "utp:position=end", None),
    Variant("none", "utp:position=none", None),
)
"""Not in the paper: the same with UTR."""


@dataclass(frozen=True)
class Row:
    """A variant measured: share right, difference to the baseline, half its interval; percent."""

    name: str
    method: str
    cr: float
    right: float
    gain: float
    half: float
    paper: float | None
    paper_gain: float | None


def rows(
    variants: tuple[Variant, ...], cr: float, found: dict[tuple[str, float], EvalResult]
) -> list[Row]:
    """The rows of one table at one ratio."""
    base, dense_paper = found[BASELINE, cr], variants[0].paper
    table = []
    for one in variants:
        marks = found[one.method, cr].marks
        gain, half = difference(marks, base.marks)
        right = 100 * marks.count("1") / len(marks)
        paper_gain = one.paper - dense_paper if one.paper and dense_paper else None
        table.append(
            Row(one.name, one.method, cr, right, 100 * gain, 100 * half, one.paper, paper_gain)
        )
    return table


def markdown(title: str, table: list[Row]) -> str:
    lines = [f"| {title} | CR | right, % | difference | paper, % | paper's difference |"]
    lines.append("|" + " --- |" * 6)
    for row in table:
        gain = f"{row.gain:+.1f} ± {row.half:.1f}" if row.method != BASELINE else "0"
        paper = "-" if row.paper is None else f"{row.paper:g}"
        theirs = "-" if row.paper_gain is None else f"{row.paper_gain:+.1f}"
        theirs = "0" if row.method == BASELINE else theirs
        lines.append(f"| {row.name} | {row.cr:g} | {row.right:.1f} | {gain} | {paper} | {theirs} |")
    return "\n".join(lines)


def _method(cell: Cell) -> str:
    return ":".join([cell.method, *(f"{name}={value}" for name, value in cell.options)])


def main() -> None:
    parser = argparse.ArgumentParser(description="UTP's ablations beside the paper's.")
    parser.add_argument("--cr", default="4", help="ratios with commas between (default 4)")
    parser.add_argument("--questions", type=int, default=HELD_OUT)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("-o", "--output", type=Path, default=Path("out/ablation"))
    parser.add_argument("--json", type=Path, help="also write every row here")
    args = parser.parse_args()
    ratios = [float(part) for part in args.cr.split(",")]
    tables = {"what and where": PARTS, "position": POSITIONS, "position, with UTR": WITH_UTR}
    methods = dict.fromkeys(one.method for variants in tables.values() for one in variants)
    request = CompareRequest(
        folder=args.output,
        cells=tuple(grid([DENSE, *methods], ratios, 1)),
        recipe=Recipe(PruneSpec(DENSE), parity=4),
        evaluation=EvalRequest(Questions(args.questions)),
        timing=None,
        jobs=args.jobs,
    )
    with Bar() as bar:
        compared = compare(request, bar)
    if missing := (*compared.out_of_reach, *compared.failed):
        raise SystemExit(f"{missing[0].method} at CR {missing[0].cr_asked:g}: {missing[0].why}")
    found = {(_method(cell), cell.cr): answered for cell, answered in answers(request).items()}
    measured = {
        title: [row for cr in ratios for row in rows(variants, cr, found)]
        for title, variants in tables.items()
    }
    print("\n\n".join(markdown(title, table) for title, table in measured.items()))
    if args.json:
        content = {"setup": compared.setup} | {
            title: [asdict(row) for row in table] for title, table in measured.items()
        }
        write_whole(args.json, (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
