"""Every method's graphs in ONNX Runtime beside its eager reference, on held-out scenes.

    python -m benchmarks.parity -o out/parity --json benchmarks/results/parity.json

Each method is exported for the demo at each ratio that its plan can reach. Then every scene is
prefilled, decoded for two tokens and asked about again on the same caches by both engines. The same
tokens have to survive at every site; what a site merges and all logits may differ by the tolerance.
Where engines choose differently between equals it is a tie: counted, and not compared further.
A run may be stopped: it writes what it has, and the next one goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from edgeprune import policies
from edgeprune.bundle import Bundle
from edgeprune.compare.bundles import Bundles, code
from edgeprune.compare.cells import Cell, grid
from edgeprune.compare.questions import Questions
from edgeprune.compare.store import Store, key_of
from edgeprune.compare.titles import DENSE
from edgeprune.compare.workers import each
from edgeprune.errors import ParityError
from edgeprune.export import parity
from edgeprune.export.dialogue import Graphs
from edgeprune.export.ties import TOLERANCE
from edgeprune.files import write_whole
from edgeprune.models import open_model
from edgeprune.models._eager import Eager
from edgeprune.models._processor import Processor, Prompt
from edgeprune.progress import Bar
from edgeprune.recipe import Recipe
from edgeprune.spec import PruneSpec
from edgeprune.versions import installed

MODEL = "demo"


@dataclass(frozen=True)
class Check:
    """A method at a ratio; differences are shares of the largest value."""

    method: str
    cr_asked: float
    cr: float = 0.0  # reached
    samples: int = 0
    same: int = 0  # samples where every site kept the same tokens
    ties: int = 0
    visual: float = 0.0  # largest difference of tokens between the graphs, merged ones too
    logits: float = 0.0  # and of logits
    why: str = ""  # it cannot be reached, or does not hold

    @property
    def fails(self) -> bool:
        """Whether the graphs and the reference part; a ratio out of reach is no failure."""
        return self.samples > 0 and self.why != ""


@dataclass(frozen=True)
class ParityRun:
    """What to check, and where what was found is kept."""

    folder: Path
    cells: tuple[Cell, ...]
    questions: Questions

    @property
    def store(self) -> Store:
        return Store(self.folder / "cells")

    @property
    def bundles(self) -> Bundles:
        recipe = Recipe(PruneSpec(DENSE), model=MODEL, parity=0)
        return Bundles(self.folder / "bundles", recipe, self.store)

    def found(self, cell: Cell) -> Check | None:
        record = self.store.read(f"{cell.name}.parity", self._key())
        return Check(**record) if record else None

    def check(self, cell: Cell, tick: Callable[[int], None]) -> None:
        """Make the bundle, compare, keep what was found, delete the bundle."""
        torch.set_num_threads(1)  # the other cores have cells of their own
        made = self.bundles.present(cell)
        found = Check(cell.label, cell.cr, why=made.why)
        if not made.why:
            found = self._compared(cell, found.method)
        self.store.write(f"{cell.name}.parity", self._key(), asdict(found))
        self.bundles.delete([cell])
        tick(1)

    def _compared(self, cell: Cell, method: str) -> Check:
        folder = self.bundles.path(cell)
        manifest = Bundle.open(folder).manifest
        prune = manifest.prune
        prompts = _prompts(self.questions)
        eager = Eager(open_model(MODEL), policies.make(cell.spec), prune.plan)
        try:
            graphs = Graphs(folder, manifest.graphs, eager)
            found = parity.check(graphs, eager, prompts)
        except ParityError as error:
            return Check(method, cell.cr, prune.cr_reached, len(prompts), why=str(error))
        same = found.samples - found.ties
        return Check(
            method,
            cell.cr,
            prune.cr_reached,
            found.samples,
            same,
            found.ties,
            found.visual,
            found.logits,
        )

    def _key(self) -> str:
        return key_of(code(), installed("onnxruntime"), self.questions.fingerprint)


@cache
def _prompts(questions: Questions) -> tuple[Prompt, ...]:
    processor = Processor(open_model(MODEL))
    return tuple(processor(asked.image, asked.text) for asked in questions)


def markdown(checks: Sequence[Check]) -> str:
    lines = ["| method | CR | scenes | same tokens | ties | visual tokens | logits |"]
    lines.append("| --- |" + " ---: |" * 6)
    for one in checks:
        if one.samples and not one.why:
            row = f"| `{one.method}` | {one.cr:.2f} | {one.samples} | {one.same} | {one.ties} |"
            lines.append(f"{row} {one.visual:.1e} | {one.logits:.1e} |")
    unlike = [one for one in checks if one.why]
    return "\n".join([*lines, *(f"{one.method}, CR {one.cr_asked:g}: {one.why}" for one in unlike)])


def main() -> None:
    parser = argparse.ArgumentParser(description="Graphs beside their eager references.")
    parser.add_argument("--methods", default="all", help="names with commas between, or all")
    parser.add_argument("--cr", default="2,4,8,16", help="ratios with commas between")
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("-o", "--output", type=Path, default=Path("out/parity"))
    parser.add_argument("--json", type=Path, help="also write every row here")
    args = parser.parse_args()
    ratios = [float(part) for part in args.cr.split(",")]
    cells = tuple(grid(args.methods.split(","), ratios, 1))
    run = ParityRun(args.output, cells, Questions(args.scenes))
    failed = _work(run, args.jobs)
    checks = [found for cell in cells if (found := run.found(cell))]
    unchecked = [cell.name for cell in cells if not run.found(cell)]
    print(markdown(checks))
    failed += [f"{one.method} at CR {one.cr:g}: {one.why}" for one in checks if one.fails]
    failed += [f"not checked: {', '.join(unchecked)}"] if unchecked else []
    if args.json:
        write_whole(args.json, _json(checks, unchecked).encode())
    if failed:
        raise SystemExit("\n".join(failed))


def _work(run: ParityRun, jobs: int) -> list[str]:
    """Check what was not checked before, until somebody stops it; why some cells failed."""
    todo = [cell for cell in run.cells if not run.found(cell)]
    done, failed = len(run.cells) - len(todo), list[str]()
    with Bar() as bar, suppress(KeyboardInterrupt):
        for cell, why in each(todo, run.check, jobs):
            done += 1
            bar("methods and ratios", done, len(run.cells))
            failed += [f"{cell.name} failed: {why}"] if why else []
    return failed


def _json(checks: Sequence[Check], unchecked: Sequence[str]) -> str:
    setup = {
        "model": MODEL,
        "tolerance": TOLERANCE,
        "source": code(),
        "onnxruntime": installed("onnxruntime"),
    }
    content = {"setup": setup, "checks": [asdict(one) for one in checks], "unchecked": unchecked}
    return json.dumps(content, indent=1) + "\n"


if __name__ == "__main__":
    main()
