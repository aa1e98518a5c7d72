"""A figure of what `bench` measured: for each bundle and backend a bar as long as one request."""

from __future__ import annotations

import statistics

from edgeprune.bench.bench import BenchResult, Row
from edgeprune.drawing.canvas import ACCENT, GHOST, INK, QUIET, SOFT, Colour, Pen, Sheet

WIDTH, MARGIN, ROW = 1200, 40, 44  # in pixels at scale 1
SIZE = 17.0  # of letters
LABELS = 340  # what stands left of the bars
ENDS = 190  # and right of them
PARTS: tuple[tuple[str, Colour], ...] = (("vision", QUIET), ("prefill", ACCENT), ("decode", SOFT))


def figure(result: BenchResult) -> Sheet:
    """Median milliseconds of vision, prefill and all decode steps, beside each other.

    What could not run stands below, without a bar.
    """
    pen, steps = Pen(), int(result.request["new_tokens"])
    whole = max(sum(_parts(row, steps)) for row in result.rows)
    lines = len(result.rows) + len(result.absent)
    sheet = Sheet(WIDTH, 2 * MARGIN + ROW * (lines + 1), pen)
    _legend(sheet, steps)
    top = MARGIN + ROW
    for row in result.rows:
        _bar(sheet, top, row, _parts(row, steps), whole)
        top += ROW
    for one in result.absent:
        sheet.box(MARGIN + LABELS, top, WIDTH - 2 * MARGIN - LABELS - ENDS, ROW - 14, GHOST)
        sheet.text(MARGIN, top + 20, f"{one.name}, {one.backend}", SIZE, QUIET)
        sheet.text(MARGIN + LABELS + 8, top + 20, "not available here", SIZE, QUIET)
        top += ROW
    return sheet


def _legend(sheet: Sheet, steps: int) -> None:
    left = float(MARGIN)
    for part, colour in PARTS:
        said = f"{part}, {steps} tokens" if part == "decode" else part
        sheet.box(left, MARGIN - 14, 14, 14, colour)
        sheet.text(left + 20, MARGIN, said, SIZE, INK)
        left += 50 + sheet.pen.length(said, SIZE)


def _bar(sheet: Sheet, top: float, row: Row, parts: list[float], whole: float) -> None:
    left, room = float(MARGIN + LABELS), WIDTH - 2 * MARGIN - LABELS - ENDS
    sheet.text(MARGIN, top + 20, f"{row.name}, {row.backend}", SIZE, INK)
    for (_, colour), part in zip(PARTS, parts, strict=True):
        wide = part / whole * room
        sheet.box(left, top, wide, ROW - 14, colour)
        left += wide
    rate = 1 / statistics.median(row.rounds.decode)
    said = f"{1e3 * sum(parts):.0f} ms, {rate:.0f} tok/s"
    sheet.text(left + 8, top + 20, said, SIZE, INK)


def _parts(row: Row, steps: int) -> list[float]:
    """Median seconds of vision, prefill and `steps` decode steps."""
    vision, prefill, decode = map(
        statistics.median, (row.rounds.vision, row.rounds.prefill, row.rounds.decode)
    )
    return [vision, prefill, steps * decode]
