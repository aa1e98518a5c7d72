"""A comparison from its request to its results, each step taken up where the last run left it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from edgeprune import __version__, policies
from edgeprune.cluster import Cluster
from edgeprune.compare.answers import EvalRequest, EvalResult
from edgeprune.compare.bundles import Bundles
from edgeprune.compare.cells import Cell
from edgeprune.compare.questions import Questions
from edgeprune.compare.results import Comparison, Missing, Result
from edgeprune.compare.store import Store
from edgeprune.compare.timing import TimingRequest
from edgeprune.compare.workers import each
from edgeprune.errors import ExportError, SpecError
from edgeprune.files import write_whole
from edgeprune.progress import Progress, silent
from edgeprune.recipe import Recipe
from edgeprune.runtime import backends

Tick = Callable[[int], None]


@dataclass(frozen=True)
class CompareRequest:
    """What to compare, on which questions, and how to time it; `timing` None leaves timing out."""

    folder: Path
    cells: tuple[Cell, ...]
    recipe: Recipe  # of all bundles, but for method, ratio, seed, weights and tiles
    evaluation: EvalRequest = field(default_factory=lambda: EvalRequest(Questions()))
    timing: TimingRequest | None = field(default_factory=TimingRequest)
    jobs: int = 1  # processes that make bundles and ask them
    keep_bundles: bool = False
    cluster: Cluster | None = None  # where cells are made and asked; None: processes here
    has_neighbours: bool = False  # whether other cells run on this machine at the same time

    def __post_init__(self) -> None:
        if self.cluster and self.keep_bundles:
            raise SpecError("--keep-bundles keeps those of this machine; leave out --ray")

    @property
    def store(self) -> Store:
        return Store(self.folder / "cells")

    @property
    def bundles(self) -> Bundles:
        return Bundles(self.folder / "bundles", self.recipe, self.store)


def compare(
    request: CompareRequest,
    report: Progress = silent,
    tell: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Make and ask every bundle, time them all, put the results together; `tell` of failures.

    A cell that failed is tried again by the next run, and so is the step that a run was stopped in;
    what was finished is read from disk, even where its bundle has been deleted.
    """
    failed = _answer(request, report, tell)
    answered = answers(request)
    reasons = {cell: why for cell in request.cells if (why := _why(request, cell))}
    for cell in request.cells:
        if not (cell in answered or cell in reasons or cell in failed):
            failed[cell] = "edgeprune's own source was changed meanwhile"
    times = _times(request, answered, report) if request.timing and answered else {}
    if not (request.keep_bundles or failed):  # the next run times them all again
        request.bundles.delete(request.cells)
    return Comparison(
        _setup(request, answered, times),
        tuple(_result(request, cell, found, times) for cell, found in answered.items()),
        tuple(Missing(cell.title, cell.cr, why) for cell, why in reasons.items()),
        tuple(Missing(cell.title, cell.cr, why) for cell, why in failed.items()),
    )


def answers(request: CompareRequest) -> dict[Cell, EvalResult]:
    """What is on disk of the cells' answers."""
    return {cell: found for cell in request.cells if (found := _stored(request, cell))}


def _answer(
    request: CompareRequest, report: Progress, tell: Callable[[str], None]
) -> dict[Cell, str]:
    """Put the answers of every cell on disk; why there are none, for each that failed."""
    size = len(request.evaluation.questions)
    todo = [c for c in request.cells if not (_why(request, c) or _stored(request, c))]
    progress = _Progress(report, "questions", size * len(request.cells))
    progress.more(progress.total - size * len(todo))
    failed = {}
    if request.cluster:
        outcomes = _answer_on_ray(request, request.cluster, todo, progress.more)
    else:
        outcomes = each(todo, partial(_answer_one, request), request.jobs, progress.more)
    for cell, why in outcomes:
        if why:
            failed[cell] = why
            tell(f"{cell.name} failed: {why}")
    return failed


def _answer_on_ray(
    request: CompareRequest, cluster: Cluster, todo: Sequence[Cell], more: Tick
) -> Iterator[tuple[Cell, str]]:
    """As `each` of processes: a job sends its cell's files back, which are written here."""
    on_host = request.recipe.execution.on_host
    gpus = int(backends.find(request.evaluation.backend).gpu or not on_host)
    sent = replace(request, cluster=None, has_neighbours=True)
    for cell, files, why in cluster.each(todo, partial(_cell_files, sent), gpus=gpus):
        for name, data in (files or {}).items():
            write_whole(request.store.folder / name, data)
        if not (why or _why(request, cell) or _stored(request, cell)):
            why = "its worker has another edgeprune, other packages or another checkpoint"
        more(len(request.evaluation.questions))
        yield cell, why


def _cell_files(request: CompareRequest, cell: Cell) -> dict[str, bytes]:
    """What a worker does: the files of a cell, made in a folder that is removed again."""
    with TemporaryDirectory(prefix="edgeprune-") as folder:
        moved = replace(request, folder=Path(folder))
        _answer_one(moved, cell, lambda done: None)
        return {file.name: file.read_bytes() for file in moved.store.folder.glob("*.json")}


def _answer_one(request: CompareRequest, cell: Cell, tick: Tick) -> None:
    _share_cores(request)
    made = request.bundles.made(cell)
    if made.why or _stored(request, cell):
        tick(len(request.evaluation.questions))
        return
    request.bundles.present(cell)  # it may have been deleted since it was made
    found = request.evaluation.ask(request.bundles.path(cell), tick)
    request.store.write(f"{cell.name}.answers", request.evaluation.key(made.hash), asdict(found))


def _why(request: CompareRequest, cell: Cell) -> str:
    """Why a cell is known to be out of reach; empty where that is not known."""
    made = request.bundles.known(cell)
    return made.why if made else ""


def _stored(request: CompareRequest, cell: Cell) -> EvalResult | None:
    """The answers of a cell, if they are on disk."""
    made = request.bundles.known(cell)
    if made is None or made.why:
        return None
    found = request.store.read(f"{cell.name}.answers", request.evaluation.key(made.hash))
    return EvalResult(**found) if found else None


def _times(
    request: CompareRequest, answered: dict[Cell, EvalResult], report: Progress
) -> dict[str, Any]:
    """Rounds of one bundle for each method and ratio, and the machine; read where stored."""
    assert request.timing is not None
    timed = [cell for cell in answered if not cell.seed]
    hashes = [request.bundles.made(cell).hash for cell in timed]
    text_tokens = next(iter(answered.values())).text_tokens
    key = request.timing.key(hashes, text_tokens)
    found = request.store.read("times", key)
    if found is None:
        progress = _Progress(report, "bundles to time", len(timed))
        for cell, why in each(timed, partial(_present, request), request.jobs, progress.more):
            if why:
                raise ExportError(f"{cell.name} was there and cannot be made again: {why}")
        paths = [request.bundles.path(cell) for cell in timed]
        found = request.timing.run(paths, text_tokens, report)
        request.store.write("times", key, found)
    return found


def _present(request: CompareRequest, cell: Cell, tick: Tick) -> None:
    _share_cores(request)
    request.bundles.present(cell)
    tick(1)


def _share_cores(request: CompareRequest) -> None:
    if request.jobs > 1 or request.has_neighbours:
        torch.set_num_threads(1)  # the other cores have cells of their own


def _result(
    request: CompareRequest, cell: Cell, found: EvalResult, times: dict[str, Any]
) -> Result:
    made = request.bundles.made(cell)
    return Result(
        method=cell.label,
        cr_asked=round(made.cr, 2) if cell.spec.exact else cell.cr,
        cr=made.cr,
        counts=made.counts,
        right=found.right,
        asked=found.asked,
        seed=cell.seed,
        weights=cell.weights,
        tiles=cell.tiles,
        weight_bytes=made.weight_bytes,
        marks=found.marks,
        stands_in=policies.load(cell.method).stands_in,
        bundle=made.hash,
        kv_bytes=found.kv_bytes,
        rounds=times.get("rounds", {}).get(cell.name, {}),
    )


def _setup(
    request: CompareRequest, answered: dict[Cell, EvalResult], times: dict[str, Any]
) -> dict[str, Any]:
    """What the results were measured with."""
    questions = request.evaluation.questions
    return {
        "edgeprune": __version__,
        "model": request.recipe.model_name,
        "questions": len(questions),
        "questions_hash": questions.fingerprint,
        "backend": request.evaluation.backend,
        "text_tokens": next((found.text_tokens for found in answered.values()), 0),
        "timing": asdict(request.timing) if request.timing else None,
        "machine": times.get("machine"),
    }


@dataclass
class _Progress:
    """Counts what several processes report."""

    report: Progress
    step: str
    total: int
    done: int = 0

    def more(self, done: int) -> None:
        self.done += done
        self.report(self.step, self.done, self.total)
