"""The results of a run as a table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.cells import cells, tiny
from edgeprune.tables import markdown, spread

HEAD = (
    "model and image",
    "engine",
    "method",
    "vision ms",
    "prefill ms",
    "TTFT ms",
    "decode ms",
    "prefill x",
    "limit x",
    "TTFT x",
    "memory GB",
    "J",
)

RANGES = ("model and image", "engine", "decode tokens at most", "engine MB", "decode ms")


def table(results: Path) -> str:
    """A Markdown table, and below it what could not be run."""
    rows = [row for _, row in sorted(_rows(results))]
    text = markdown(HEAD, rows)
    failed = [
        f"- {file.stem}: {found['failed'].splitlines()[-1]}"
        for file, found in _files(results, "*")
        if "failed" in found
    ]
    parts = [text, *_ranges(results), "\n".join(failed)]
    return "\n\n".join(part for part in parts if part)


def _ranges(results: Path) -> Iterator[str]:
    """What the range of the decode profile costs, where engines were built."""
    lines = [
        [
            *_named(found["cell"]),
            found["backend"],
            str(one["tokens"]),
            f"{one['bytes'] / 1e6:.1f}",
            _milliseconds(one["rounds"]["decode"]) if "rounds" in one else "-",
        ]
        for _, found in _files(results, "ranges-*")
        for one in found.get("ranges", [])
    ]
    if lines:
        yield markdown(RANGES, lines)


def _rows(results: Path) -> Iterator[tuple[tuple[int, str], tuple[str, ...]]]:
    """Lines of the table, each with its sort key: cells in their order, eager torch first."""
    order = {cell.name: index for index, cell in enumerate((*cells(), *tiny()))}
    eager = {
        row["cell"]: row
        for _, found in _files(results, "eager-*")
        for row in found.get("cells", [])
    }
    for _, found in _files(results, "bench-*"):
        rows = found.get("rows", [])
        for row in rows:
            if one := eager.pop(row["name"], None):
                yield (order[row["name"]], ""), _eager(one)
            yield (order[row["name"]], row["backend"]), _row(row, rows[0])
    for name, row in eager.items():
        yield (order[name], ""), _eager(row)


def _files(results: Path, pattern: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    for file in sorted(results.glob(f"{pattern}.json")):
        yield file, json.loads(file.read_text())


def _row(row: dict[str, Any], first: dict[str, Any]) -> tuple[str, ...]:
    rounds, base = row["rounds"], first["rounds"]
    whole = _sums(rounds)
    return (
        *_named(row["name"]),
        row["backend"],
        _method(row["name"]),
        _milliseconds(rounds["vision"]),
        _milliseconds(rounds["prefill"]),
        _milliseconds(whole),
        _milliseconds(rounds["decode"]),
        f"{_ratio(base['prefill'], rounds['prefill']):.2f}",
        f"{first['prefill_operations'] / row['prefill_operations']:.2f}",
        f"{_ratio(_sums(base), whole):.2f}",
        "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}",
        "-" if row["joules"] is None else f"{statistics.median(row['joules']):.1f}",
    )


def _eager(row: dict[str, Any]) -> tuple[str, ...]:
    parts = [
        row["vision"],
        row["prefill"],
        row["vision"] + row["prefill"],
        row["decode"],
    ]
    peak = row["peak_bytes"]
    memory = "-" if peak is None else f"{peak / 1e9:.2f}"
    numbers = [f"{1e3 * part:.2f}" for part in parts]
    name = row["cell"]
    return (*_named(name), "eager", _method(name), *numbers, "", "", "", memory, "")


def _named(cell: str) -> tuple[str]:
    shape, visual, *_ = cell.split("-")
    return (f"{shape}, {int(visual):,} + 64",)


def _method(cell: str) -> str:
    _, _, *method, target = cell.split("-")
    return "-".join(method) + ("" if target == "cuda" else f" ({target})")


def _sums(rounds: dict[str, Sequence[float]]) -> list[float]:
    return [a + b for a, b in zip(rounds["vision"], rounds["prefill"], strict=True)]


def _ratio(first: Sequence[float], other: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(first, other, strict=True))


def _milliseconds(seconds: Sequence[float]) -> str:
    return spread([1e3 * one for one in seconds])
