"""`bench`: bundles timed side by side in one run, lap by lap in turn, beside what counting allows.

Every lap is vision, prefill and a run of decode steps. Laps of all bundles alternate, so a machine
whose speed drifts slows them all; ratios are taken lap by lap against the first bundle.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune import cost
from edgeprune.bundle import Bundle
from edgeprune.errors import BackendError, CapacityError, SpecError
from edgeprune.runtime.backend import Chunk
from edgeprune.runtime.ort import ELEMENTS, OrtBackend
from edgeprune.runtime.session import BACKENDS

PREFIX = 5
"""Text tokens before the picture; LLaVA-1.5 without a system text has about as many."""


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
        least = {"text_tokens": PREFIX + 1, "new_tokens": 1, "laps": 1, "warmup": 0}
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
        heads = ["bundle", "vision ms", "prefill ms", "decode ms/token", "KV MB"]
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
    racers = [_Racer(path, request) for path in request.bundles]
    total = request.warmup + request.laps
    for lap in range(total):
        for racer in racers:
            racer.lap(keep=lap >= request.warmup)
        progress(lap + 1, total)
    plain = asdict(request) | {"bundles": [path.name for path in request.bundles]}
    return BenchResult(tuple(r.row() for r in racers), plain, _machine())


class _Racer:
    """One bundle on its engine, with inputs made of noise."""

    def __init__(self, path: Path, request: BenchRequest) -> None:
        started = time.perf_counter()
        self.bundle = Bundle.open(path, verify=False)
        device = request.backend.partition("-")[2]
        self.backend = OrtBackend(self.bundle, device, request.threads)
        self.load_seconds = time.perf_counter() - started
        self.request, self.manifest = request, self.bundle.manifest
        image, rng = self.manifest.image, np.random.default_rng(0)
        self.pixels = rng.standard_normal(image.shape, np.float32)
        ids = rng.integers(3, self.manifest.decoder.vocabulary, (1, request.text_tokens))
        self.prefix_ids, self.text_ids = ids[:, :PREFIX], ids[:, PREFIX:]
        self.counts = np.array(self.manifest.prune.counts)
        self.laps: list[tuple[float, float, float]] = []
        needed = self.manifest.span + request.text_tokens + request.new_tokens
        if needed > self.manifest.decoder.max_positions:
            raise CapacityError(
                f"{path} has {self.manifest.decoder.max_positions} positions, this bench needs"
                f" {needed}; lower --text-tokens or --new-tokens"
            )

    def lap(self, keep: bool) -> None:
        clock = time.perf_counter
        begin = clock()
        self.backend.see(self.pixels)
        seen = clock()
        lengths, position = np.zeros(len(self.counts), np.int64), 0
        after = lengths + self.request.text_tokens + self.counts
        self._run(Chunk(self.prefix_ids, self.text_ids, position, lengths, True), after)
        filled = clock()
        lengths, position = after, self.request.text_tokens + self.manifest.span
        empty, token = np.zeros((1, 0), np.int64), self.text_ids[:, :1]
        for step in range(self.request.new_tokens):
            self._run(Chunk(empty, token, position + step, lengths, False), lengths + 1)
            lengths = lengths + 1
        done = clock()
        if keep:
            steps = (done - filled) / self.request.new_tokens
            self.laps.append((seen - begin, filled - seen, steps))

    def _run(self, chunk: Chunk, after: np.ndarray) -> None:
        self.backend.reserve(after.tolist())
        self.backend.run(chunk)

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
