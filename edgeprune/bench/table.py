"""A table of what `bench` measured; below it whether backends agree, and what could not run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from edgeprune.bench.bench import BenchResult, Row
from edgeprune.tables import plain, spread

HEADS = (
    "bundle",
    "backend",
    "weights",
    "vision ms",
    "prefill ms",
    "TTFT ms",
    "decode ms/token",
    "tok/s",
    "KV MB",
    "peak MB",
    "load s",
    "build s",
    "J",
    "vision x",
    "vision limit x",
    "TTFT x",
    "prefill x",
    "limit x",
    "reached",
    "decode x",
)


def table(result: BenchResult) -> str:
    """Medians with p10-p90; ratios, round by round, to the first bundle on the same backend."""
    lines = [HEADS, *rows(result)]
    agree = [one.line() for one in result.agreements]
    absent = [f"not run: {one.name} on {one.backend}: {one.why}" for one in result.absent]
    return "\n".join([plain(lines, left=2), *_predictions(result.rows), *agree, *absent])


def _predictions(rows: Sequence[Row]) -> list[str]:
    """What a profile promised of vision and prefill, and what was reached."""
    return [
        f"{row.name}: {row.predicted:.2f} ms predicted by its profile, {reached:.2f} ms reached"
        f" ({reached / row.predicted - 1:+.1%})"
        for row in rows
        if row.predicted and (reached := 1e3 * row.first_token)
    ]


def rows(result: BenchResult) -> list[tuple[str, ...]]:
    """A row per bundle and backend, a cell for each of HEADS."""
    first: dict[str, Row] = {}
    return [_cells(row, first.setdefault(row.backend, row)) for row in result.rows]


def _cells(row: Row, first: Row) -> tuple[str, ...]:
    speedup = _ratio(first.rounds.prefill, row.rounds.prefill)
    limit = first.prefill_operations / row.prefill_operations
    encoder = first.encoder_operations / row.encoder_operations
    return (
        row.name,
        row.backend,
        f"{row.weights.partition(':')[0]} {row.weight_bytes / 1e6:.1f} MB",
        _milliseconds(row.rounds.vision),
        _milliseconds(row.rounds.prefill),
        f"{1e3 * row.first_token:.2f}",
        _milliseconds(row.rounds.decode),
        f"{1 / statistics.median(row.rounds.decode):.1f}",
        f"{row.kv_bytes / 1e6:.2f}",
        "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}",
        f"{row.load_seconds:.2f}",
        "-" if row.build_seconds is None else f"{row.build_seconds:.1f}",
        "-" if row.joules is None else f"{statistics.median(row.joules):.2f}",
        f"{_ratio(first.rounds.vision, row.rounds.vision):.2f}",
        f"{encoder:.2f}",
        f"{_ratio(_first_tokens(first), _first_tokens(row)):.2f}",
        f"{speedup:.2f}",
        f"{limit:.2f}",
        f"{speedup / limit:.0%}",
        f"{_ratio(first.rounds.decode, row.rounds.decode):.2f}",
    )


def _first_tokens(row: Row) -> list[float]:
    """Seconds of vision and prefill together, of each round."""
    return [v + p for v, p in zip(row.rounds.vision, row.rounds.prefill, strict=True)]


def _ratio(base: Sequence[float], other: Sequence[float]) -> float:
    """Median over rounds of base / other."""
    return statistics.median(b / o for b, o in zip(base, other, strict=True))


def _milliseconds(seconds: Sequence[float]) -> str:
    return spread([1e3 * one for one in seconds])
