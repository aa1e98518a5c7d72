"""The steps of a run, each a command of its own whose result is one JSON file.

A step whose file is there is not run again, so a run that was ended goes on. A step that fails, or
takes longer than it may, leaves a file with the reason, and the next one runs.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.gpu import random_weights
from benchmarks.gpu.cells import SIDES, Cell
from edgeprune.bench.bench import BenchRequest, bench
from edgeprune.errors import EdgepruneError
from edgeprune.graph_contract import WEIGHTS
from edgeprune.runtime import machine, trt
from edgeprune.runtime.build import STEP, BuildRequest, build
from edgeprune.runtime.engines import ENGINES

LIMIT = 240
"""Seconds that one command may take."""
COUNTED = ("0.5b", "tiny")
"""Shapes whose launches are counted: graphs of other sizes have the same nodes per layer."""


DECODE_TOKENS = (STEP, 8, 1)
"""Tokens that a decode profile takes at most; of one exactly TensorRT stores weights twice."""


@dataclass(frozen=True)
class Request:
    """What to run, and where: bundles without weights in `prepared`, JSON files to `results`."""

    cells: tuple[Cell, ...]
    prepared: Path
    results: Path
    backends: tuple[str, ...]
    device: str = "cuda"  # of eager torch and of the count of launches
    rounds: int = 10
    new_tokens: int = 32
    eager: bool = True
    tests: bool = True
    deadline: float = field(default=float("inf"))  # of time.monotonic(): nothing starts after it

    @property
    def groups(self) -> list[tuple[str, tuple[Cell, ...]]]:
        """Cells that are timed beside each other: one shape, image and target."""
        found = groupby(self.cells, lambda cell: f"{cell.shape}-{cell.visual}-{cell.target}")
        return [(name, tuple(cells)) for name, cells in found]


@dataclass(frozen=True)
class Step:
    name: str
    run: Callable[[], dict[str, Any]]


def run(request: Request) -> None:
    """All steps in order."""
    request.results.mkdir(parents=True, exist_ok=True)
    for step in steps(request):
        file = request.results / f"{step.name}.json"
        if file.is_file():
            continue
        if time.monotonic() > request.deadline:
            print(f"{step.name}: no time left", flush=True)
            continue
        begin = time.perf_counter()
        try:
            found = step.run()
        except (EdgepruneError, RuntimeError, OSError, ValueError, subprocess.SubprocessError) as e:
            found = {"failed": f"{type(e).__name__}: {str(e)[:4000]}"}
        found["seconds"] = round(time.perf_counter() - begin, 1)
        file.write_text(json.dumps(found) + "\n")
        said = found.get("failed", "done")
        print(f"{step.name}: {said.splitlines()[-1]} ({found['seconds']} s)", flush=True)


def steps(request: Request) -> Iterator[Step]:
    """In the order of what matters most."""
    yield Step("machine", lambda: asdict(machine.describe()))
    for backend in request.backends:
        yield Step(f"answers-{backend}", partial(_answers, request, backend))
    for name, cells in request.groups:
        for backend in request.backends:
            yield Step(f"bench-{name}-{backend}", partial(_bench, request, cells, backend))
        if request.eager and cells[0].target == "cuda":
            yield Step(f"eager-{name}", partial(_eager, request, cells))
        if cells[0].shape in COUNTED and cells[0].side < SIDES[-1]:
            for cell in cells:
                yield Step(f"launches-{cell.name}", partial(_launches, request, cell))
            for backend in request.backends:
                if backend in trt.MODULES:
                    task = partial(_ranges, request, cells[0], backend)
                    yield Step(f"ranges-{cells[0].name}-{backend}", task)
        yield Step(f"emptied-{name}", partial(_empty, request, cells))
    if request.tests:
        yield Step("tests", _tests)


def _bench(request: Request, cells: Sequence[Cell], backend: str) -> dict[str, Any]:
    """Fill in weights, build engines where the backend runs those, and time all in turn."""
    begin, paths = time.perf_counter(), tuple(request.prepared / cell.name for cell in cells)
    for path in paths:
        random_weights.fill(path)
    filled = time.perf_counter() - begin
    if backend in trt.MODULES:
        for path in paths:
            random_weights.seal(path)
            build(BuildRequest(path, backend))
    asked = BenchRequest(paths, (backend,), rounds=request.rounds, new_tokens=request.new_tokens)
    return {"filled_seconds": filled, **json.loads(bench(asked).to_json())}


def _ranges(request: Request, cell: Cell, backend: str) -> dict[str, Any]:
    """What the range of the decode profile costs: engines for up to 128 tokens, up to 8, one.

    Sizes are of the decoder's engine; where no GPU runs it, times are missing, with the reason.
    """
    path = request.prepared / cell.name
    random_weights.fill(path)
    random_weights.seal(path)
    found = []
    for tokens in DECODE_TOKENS:
        shutil.rmtree(path / ENGINES, ignore_errors=True)  # of several one would be chosen
        built = build(BuildRequest(path, backend, decode_tokens=tokens))
        engine = built.record["engines"]["decoder"]
        one = {"tokens": tokens, "bytes": engine["bytes"], "build_seconds": engine["seconds"]}
        try:
            asked = BenchRequest((path,), (backend,), rounds=request.rounds)
            one["rounds"] = asdict(bench(asked).rows[0].rounds)
        except EdgepruneError as error:
            one["why"] = str(error)
        found.append(one)
    shutil.rmtree(path / ENGINES)
    return {"cell": cell.name, "backend": backend, "ranges": found}


def _empty(request: Request, cells: Sequence[Cell]) -> dict[str, Any]:
    """Give the disk back."""
    for cell in cells:
        if (request.prepared / cell.name / random_weights.NOTES).is_file():
            (request.prepared / cell.name / WEIGHTS).unlink(missing_ok=True)
    return {}


def _launches(request: Request, cell: Cell) -> dict[str, Any]:
    random_weights.fill(request.prepared / cell.name)
    path = str(request.prepared / cell.name)
    return _run_json("benchmarks.gpu.launches", path, "--device", request.device)


def _eager(request: Request, cells: Sequence[Cell]) -> dict[str, Any]:
    return _run_json(
        "benchmarks.gpu.eager",
        *(cell.name for cell in cells),
        *("--rounds", str(request.rounds), "--new-tokens", str(request.new_tokens)),
        *("--device", request.device),
    )


def _answers(request: Request, backend: str) -> dict[str, Any]:
    """The demo's answers with every method beside those of ONNX Runtime on the CPU."""
    return _run_json("benchmarks.gpu.answers", str(request.prepared), "--backend", backend)


def _tests() -> dict[str, Any]:
    """`pytest -m gpu`: its last lines, and a line for each test."""
    options = ["-m", "gpu", "-v", "--tb=short", "--show-capture=no"]
    done = _command("pytest", *options, "tests/test_gpu.py")
    found: dict[str, Any] = {"tail": done.stdout[-12000:], "errors": done.stderr[-2000:]}
    if done.returncode:
        found["failed"] = (done.stdout.strip() or done.stderr.strip())[-2000:]
    return {"code": done.returncode, **found}


def _run_json(module: str, *arguments: str) -> dict[str, Any]:
    """The one line of JSON that a module prints."""
    done = _command(module, *arguments)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:] or f"{module} ended with {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _command(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
