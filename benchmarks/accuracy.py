"""Exact-match accuracy of methods and ratios on the demo benchmark, through the real bundles.

    python -m benchmarks.accuracy --methods utp,random,uniform --cr 2,4,8,16 --questions 2400

Exports what is missing below --work, answers held-out questions with the torch-free runtime, prints
one table and writes one JSON. A cell that was measured on the same files is not measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from edgeprune import __version__
from edgeprune.bundle import MANIFEST
from edgeprune.cli import main as edgeprune
from edgeprune.demo.questions import KINDS, held_out
from edgeprune.runtime import Session


@dataclass(frozen=True)
class Cell:
    """One bundle's answers: right and asked, by kind of question."""

    bundle: str
    method: str
    cr: float  # reached
    counts: tuple[int, ...]
    right: dict[str, int]
    asked: dict[str, int]
    fingerprint: str  # of the bundle's files and the number of questions

    def share(self, kind: str) -> float:
        return self.right[kind] / self.asked[kind]

    @property
    def overall(self) -> float:
        return sum(self.right.values()) / sum(self.asked.values())

    @property
    def interval(self) -> float:
        """Half the 95% Wilson interval of the overall share."""
        n, p, z = sum(self.asked.values()), self.overall, 1.96
        return z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)


def measure(path: Path, questions: int) -> Cell:
    """Ask one bundle every question."""
    session = Session.open(path, threads=1)  # several threads gain nothing at this size
    right: dict[str, int] = defaultdict(int)
    asked: dict[str, int] = defaultdict(int)
    for done, (image, question) in enumerate(held_out(questions), start=1):
        answer = session.ask(image, question.text)
        asked[question.kind] += 1
        right[question.kind] += answer.text == question.answer
        if sys.stderr.isatty() and done % 50 == 0:
            print(f"\r{path.name} {done}/{questions}", end="", file=sys.stderr)
    prune = session.manifest.prune
    return Cell(
        bundle=path.name,
        method=prune.method,
        cr=prune.cr_reached,
        counts=prune.counts,
        right={kind: right[kind] for kind in KINDS},
        asked={kind: asked[kind] for kind in KINDS},
        fingerprint=fingerprint(path, questions),
    )


def fingerprint(path: Path, questions: int) -> str:
    return hashlib.sha256((path / MANIFEST).read_bytes() + f"{questions}".encode()).hexdigest()


def exported(work: Path, method: str, cr: float, seed: int) -> Path | None:
    """The bundle of one cell, exported where it is missing; None where the CR is out of reach."""
    name = "demo-none" if method == "none" else f"demo-{method}-cr{cr:g}-seed{seed}"
    path = work / name
    if not (path / MANIFEST).is_file():
        command = ["export", "--method", method, "--cr", f"{cr:g}", "--seed", f"{seed}"]
        if edgeprune([*command, "-o", str(path)]):
            return None  # the command has said why
    return path


def table(cells: Iterable[Cell]) -> str:
    """Markdown: a row per method and ratio, shares in percent."""
    heads = ["method", "CR", "overall", *KINDS]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for name, cr, group in _grouped(cells):
        overall = sum(c.overall for c in group) / len(group)
        spread = f"± {100 * group[0].interval:.1f}"
        if len(group) > 1:  # several seeds: their range says more
            low, high = (100 * f(c.overall for c in group) for f in (min, max))
            spread = f"({low:.1f} to {high:.1f})"
        shares = [f"{100 * sum(c.share(k) for c in group) / len(group):.1f}" for k in KINDS]
        row = [name, f"{cr:.2f}".rstrip("0").rstrip("."), f"{100 * overall:.1f} {spread}", *shares]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _grouped(cells: Iterable[Cell]) -> list[tuple[str, float, list[Cell]]]:
    groups: dict[tuple[float, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[round(cell.cr, 2), cell.method].append(cell)
    return [(method, cr, group) for (cr, method), group in sorted(groups.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy on the demo benchmark.")
    parser.add_argument("--methods", default="utp,random,uniform")
    parser.add_argument("--cr", default="2,4,8,16")
    parser.add_argument("--seeds", type=int, default=3, help="draws of random (default 3)")
    parser.add_argument("--questions", type=int, default=2400)
    parser.add_argument("--work", type=Path, default=Path("out/accuracy"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/accuracy.json"))
    args = parser.parse_args()
    jobs = [("none", 1.0, 0)]
    for cr in map(float, args.cr.split(",")):
        for method in args.methods.split(","):
            jobs += [(method, cr, s) for s in range(args.seeds if method == "random" else 1)]
    stored = {}
    if args.json.is_file():
        for record in json.loads(args.json.read_text())["cells"]:
            cell = Cell(**{**record, "counts": tuple(record["counts"])})
            stored[cell.bundle] = cell
    cells = []
    for job in jobs:
        path = exported(args.work, *job)
        if path is None:
            continue
        cell = stored.get(path.name)
        if cell is None or cell.fingerprint != fingerprint(path, args.questions):
            cell = measure(path, args.questions)
        cells.append(cell)
        content = {
            "edgeprune": __version__,
            "questions": args.questions,
            "cells": [asdict(cell) for cell in cells],
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    print(table(cells))


if __name__ == "__main__":
    main()
