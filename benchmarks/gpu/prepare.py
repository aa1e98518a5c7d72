"""Bundles of the cells without their weights, and of the demo with them; needs torch, no GPU."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import random_weights
from benchmarks.gpu.cells import Cell
from benchmarks.schedules import planned
from benchmarks.shapes import write
from edgeprune.errors import SpecError
from edgeprune.export.exporter import ExportRequest, export
from edgeprune.models import Adapter, open_model
from edgeprune.models._processor import Processor
from edgeprune.policies import make, names
from edgeprune.spec import PruneSpec, budget

DEMO, DEMO_CR = "demo", 4


def prepare(cells: Sequence[Cell], folder: Path) -> None:
    """Export each cell that is not there, from a checkpoint of zeros, and take out its weights."""
    for cell in cells:
        if (folder / cell.name / random_weights.NOTES).is_file():
            continue
        begin = time.perf_counter()
        work = folder / ".work"
        try:
            random_weights.empty(_export(cell, work))
            (work / cell.name).rename(folder / cell.name)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        print(f"{cell.name}: {time.perf_counter() - begin:.0f} s", flush=True)


def _export(cell: Cell, work: Path) -> Path:
    """A bundle of one cell with a made-up schedule, its weights zeros."""
    adapter = open_model(str(write(cell.sized, work / "checkpoint", sparse=True)))
    assert adapter.shape.visual_tokens == cell.visual
    spec = PruneSpec(cell.method, cell.cr)
    return _bundle(adapter, spec, work / cell.name, cell.target, cell.sites, cell.weights)


def prepare_demo(folder: Path, methods: Sequence[str] = ()) -> None:
    """Export the demo model, weights and all, with every method that takes this ratio."""
    adapter = open_model("demo")
    for method in methods or names():
        output = folder / f"{DEMO}-{method}"
        if output.exists():
            continue
        try:
            _bundle(adapter, PruneSpec(method, 1 if method == "none" else DEMO_CR), output, "cuda")
        except SpecError as error:
            print(f"{method}: {error}", flush=True)


def stepped(visual: int, layers: int, cr: float, sites: int) -> tuple[int, ...]:
    """A schedule that falls at so many layers, evenly apart behind the second, by one factor."""
    falls = [2 + round(site * (layers - 2) / sites) for site in range(sites)]
    step = [sum(layer >= fall for fall in falls) for layer in range(layers)]
    low, high = 0.0, 1.0
    for _ in range(60):
        factor = (low + high) / 2
        total = sum(round(visual * factor**n) for n in step)
        low, high = (factor, high) if total <= budget(visual, layers, cr) else (low, factor)
    return tuple(round(visual * low**n) for n in step)


def _bundle(
    adapter: Adapter,
    spec: PruneSpec,
    output: Path,
    target: str,
    sites: int | None = None,
    weights: str = "float",
) -> Path:
    """A float16 bundle; a schedule that a method wants is made up."""
    policy, shape = make(spec), adapter.shape
    counts = stepped(shape.visual_tokens, shape.layers, spec.cr, sites) if sites else ()
    plan = planned(policy, shape, spec.cr, counts)
    why = "it is compared on the GPU"
    request = ExportRequest(output.name, spec, plan, output, target, "fp16", weights, no_parity=why)
    return export(request, adapter, policy, Processor(adapter), []).path
