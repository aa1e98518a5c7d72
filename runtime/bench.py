"""`bench`: bundles timed side by side in one run, lap by lap in turn, beside what counting allows.

Every lap is vision, prefill and a run of decode steps. Laps of all bundles alternate, so a machine
whose speed drifts slows them all; ratios are taken lap by lap against the first bundle. Each bundle
runs in a process of its own (`_racer`), all of them loaded throughout.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune import cost, errors
from edgeprune.bundle import Bundle
from edgeprune.errors import BackendError, SpecError
from edgeprune.runtime import _racer
from edgeprune.runtime.ort import ELEMENTS
from edgeprune.runtime.session import BACKENDS


@dataclass(frozen=True)
class BenchRequest:
    """What to time: text tokens beside the picture's, decode steps a lap, laps and warm-up laps."""

    bundles: tuple[Path, ...]
    backend: str = "ort-cpu"
    text_tokens: int = 64
    new_tokens: int = 32
    laps: int = 10
    warmup: int = 2
    threads: int | None = None

    def __post_init__(self) -> None:
        least = {"text_tokens": _racer.PREFIX + 1, "new_tokens": 1, "laps": 1, "warmup": 0}
        for name, number in least.items():
            if (found := getattr(self, name)) < number:
                raise SpecError(f"--{name.replace('_', '-')} is at least {number}; got {found}")
        if self.backend not in BACKENDS:
            raise BackendError(
                f"there is no backend {self.backend!r}; choose: {', '.join(BACKENDS)}"
            )


@dataclass(frozen=True)
class Laps:
    """Seconds of each lap; decode is per token."""

    vision: tuple[float, ...]
    prefill: tuple[float, ...]
    decode: tuple[float, ...]


@dataclass(frozen=True)
class Row:
    """One bundle's laps and what counting says of it, relative to the first bundle's."""

    name: str
    method: str
    cr: float
    dtype: str
    laps: Laps
    load_seconds: float
    kv_bytes: int  # of the caches as reserved, prefill and answer
    peak_bytes: int | None  # that its process had resident at most, where the machine tells
    prefill_operations: int
    decode_operations: int


@dataclass(frozen=True)
class BenchResult:
    rows: tuple[Row, ...]
    request: dict[str, Any]
    machine: dict[str, str]

    def to_json(self) -> str:
        """One line, for programs."""
        return json.dumps(asdict(self))

    def table(self) -> str:
        """For people: medians with p10-p90, ratios to the first bundle taken lap by lap."""
        first = self.rows[0]
        heads = ["bundle", "vision ms", "prefill ms", "decode ms/token", "KV MB", "peak MB"]
        heads += ["prefill x", "limit x", "reached", "decode x"]
        lines = [heads, *(_cells(row, first) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
        return "\n".join(
            "  ".join(
                c.ljust(w) if i == 0 else c.rjust(w)
                for i, (c, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        )


def bench(
    request: BenchRequest, progress: Callable[[int, int], None] = lambda done, total: None
) -> BenchResult:
    """Time every bundle, interleaved; the first is the one that ratios are taken to."""
    total = request.warmup + request.laps
    with ExitStack() as stack:
        racers = [stack.enter_context(_Racer(path, request)) for path in request.bundles]
        for racer in racers:
            racer.load()
        for lap in range(total):
            for racer in racers:
                racer.lap(keep=lap >= request.warmup)
            progress(lap + 1, total)
        rows = tuple(racer.row() for racer in racers)
    plain = asdict(request) | {"bundles": [path.name for path in request.bundles]}
    return BenchResult(rows, plain, _machine())


class _Racer:
    """A bundle's process, and the laps that it has run."""

    def __init__(self, path: Path, request: BenchRequest) -> None:
        self.request = request
        self.manifest = Bundle.open(path, verify=False).manifest
        self.laps: list[tuple[float, float, float]] = []
        self.peak_bytes: int | None = None
        self.process = subprocess.Popen(
            [sys.executable, "-m", _racer.__name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started = {
            "path": str(path),
            "backend": request.backend,
            "text_tokens": request.text_tokens,
            "new_tokens": request.new_tokens,
            "threads": request.threads,
        }
        self.started = json.dumps(started)

    def load(self) -> None:
        """Have the process open its bundle."""
        self.load_seconds: float = self._ask(self.started)["load_seconds"]

    def __enter__(self) -> _Racer:
        return self

    def __exit__(self, *raised: object) -> None:
        self.process.kill()
        self.process.communicate()

    def lap(self, keep: bool) -> None:
        found = self._ask("lap")
        (vision, prefill, decode), self.peak_bytes = found["lap"], found["peak_bytes"]
        if keep:
            self.laps.append((vision, prefill, decode))

    def _ask(self, line: str) -> dict[str, Any]:
        """One line to the process, one line back; its errors are raised here."""
        assert self.process.stdin and self.process.stdout  # both are pipes
        answer = ""
        with suppress(BrokenPipeError):
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        if not answer:
            raise BackendError(
                f"the process that ran {self.manifest.name} ended with code"
                f" {self.process.wait()}; where memory is short, bench fewer bundles at once"
            )
        found: dict[str, Any] = json.loads(answer)
        if "error" in found:
            raise getattr(errors, found["error"])(found["message"])
        return found

    def row(self) -> Row:
        record, prune, text = self.manifest.decoder, self.manifest.prune, self.request.text_tokens
        vision, prefill, decode = (tuple(column) for column in zip(*self.laps, strict=True))
        return Row(
            name=self.manifest.name,
            method=prune.method,
            cr=prune.cr_reached,
            dtype=self.manifest.dtype,
            laps=Laps(vision, prefill, decode),
            load_seconds=self.load_seconds,
            kv_bytes=cost.kv_bytes(
                record,
                prune.counts,
                text + self.request.new_tokens,
                np.dtype(ELEMENTS[self.manifest.dtype]).itemsize,
            ),
            peak_bytes=self.peak_bytes,
            prefill_operations=cost.prefill_operations(record, prune.counts, text),
            decode_operations=cost.decode_operations(
                record, prune.counts, text + self.request.new_tokens // 2
            ),
        )


def _cells(row: Row, first: Row) -> list[str]:
    speedup = _ratio(first.laps.prefill, row.laps.prefill)
    limit = first.prefill_operations / row.prefill_operations
    return [
        row.name,
        _spread(row.laps.vision),
        _spread(row.laps.prefill),
        _spread(row.laps.decode),
        f"{row.kv_bytes / 1e6:.2f}",
        "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.0f}",
        f"{speedup:.2f}",
        f"{limit:.2f}",
        f"{speedup / limit:.0%}",
        f"{_ratio(first.laps.decode, row.laps.decode):.2f}",
    ]


def _ratio(base: Sequence[float], other: Sequence[float]) -> float:
    """Median over laps of base / other."""
    return statistics.median(b / o for b, o in zip(base, other, strict=True))


def _spread(seconds: Sequence[float]) -> str:
    low, middle, high = (1e3 * float(q) for q in np.quantile(seconds, [0.1, 0.5, 0.9]))
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def _machine() -> dict[str, str]:
    packages = {name: version(name) for name in ("edgeprune", "numpy")}
    return {
        "processor": _processor(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "onnxruntime": _onnxruntime(),
        **packages,
    }


def _onnxruntime() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} threads" if names else platform.processor() or "unknown"
