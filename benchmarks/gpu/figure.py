"""The results of a run as a figure: a bar for each method on each engine, one request long."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from benchmarks.gpu.cells import cells, tiny
from edgeprune.drawing.canvas import ACCENT, INK, QUIET, SOFT, Colour, Pen, Sheet

WIDTH, MARGIN, ROW, LABELS, ENDS = 1200, 40, 30, 330, 190  # in pixels at scale 1
SIZE, HEADING = 16.0, 20.0  # of letters
STEPS = 32
"""Decode steps of a request."""
PARTS: tuple[tuple[str, Colour], ...] = (
    ("vision", QUIET),
    ("prefill", ACCENT),
    (f"decode, {STEPS} tokens", SOFT),
)


@dataclass(frozen=True)
class Bar:
    """Median milliseconds of vision, prefill and all decode steps."""

    group: str  # shape and tokens
    order: int  # of its cell
    label: str
    parts: tuple[float, float, float]


def figure(results: Path) -> Sheet:
    """Bars of one shape and image are below each other, as long as that group's longest."""
    pen, bars = Pen(), sorted(read(results), key=lambda bar: (bar.order, bar.label))
    groups = [(name, list(found)) for name, found in groupby(bars, key=lambda bar: bar.group)]
    height = sum(ROW * len(found) + 3 * ROW // 2 for _, found in groups)
    sheet = Sheet(WIDTH, 2 * MARGIN + ROW + height, pen)
    _legend(sheet)
    top = float(MARGIN + ROW)
    for name, found in groups:
        sheet.text(MARGIN, top + 20, name, HEADING, bold=True)
        top += ROW
        longest = max(sum(bar.parts) for bar in found)
        for bar in found:
            _draw(sheet, top, bar, longest)
            top += ROW
        top += ROW / 2
    return sheet


def read(results: Path) -> Iterator[Bar]:
    """The bars of all benches and of eager torch; files of other steps are passed over."""
    order = {cell.name: index for index, cell in enumerate((*cells(), *tiny()))}
    for file in sorted(results.glob("bench-*.json")):
        for row in json.loads(file.read_text()).get("rows", []):
            vision, prefill, decode = (
                statistics.median(row["rounds"][part]) for part in ("vision", "prefill", "decode")
            )
            yield _bar(row["name"], row["backend"], order, (vision, prefill, decode))
    for file in sorted(results.glob("eager-*.json")):
        for row in json.loads(file.read_text()).get("cells", []):
            seconds = (row["vision"], row["prefill"], row["decode"])
            yield _bar(row["cell"], "eager torch", order, seconds)


def _bar(cell: str, engine: str, order: dict[str, int], seconds: tuple[float, float, float]) -> Bar:
    shape, visual, *method, target = cell.split("-")
    vision, prefill, decode = (1e3 * part for part in seconds)
    group = f"{shape}, {int(visual):,} visual and 64 text tokens"
    group += "" if target == "cuda" else f", {target}"
    label = f"{'-'.join(method)}, {engine}"
    return Bar(group, order[cell], label, (vision, prefill, STEPS * decode))


def _legend(sheet: Sheet) -> None:
    left = float(MARGIN)
    for part, colour in PARTS:
        sheet.box(left, MARGIN - 14, 14, 14, colour)
        sheet.text(left + 20, MARGIN, part, SIZE, INK)
        left += 50 + sheet.pen.length(part, SIZE)


def _draw(sheet: Sheet, top: float, bar: Bar, longest: float) -> None:
    left, room = float(MARGIN + LABELS), WIDTH - 2 * MARGIN - LABELS - ENDS
    sheet.text(MARGIN, top + 17, bar.label, SIZE, INK)
    for (_, colour), part in zip(PARTS, bar.parts, strict=True):
        wide = part / longest * room
        sheet.box(left, top, wide, ROW - 8, colour)
        left += wide
    first = bar.parts[0] + bar.parts[1]
    sheet.text(left + 8, top + 17, f"{sum(bar.parts):.0f} ms, first {first:.1f}", SIZE, INK)
