"""Time to first token against predicted loss, as a figure: the points that nothing beats."""

from __future__ import annotations

from collections.abc import Sequence

from edgeprune.drawing.canvas import ACCENT, GHOST, INK, QUIET, SOFT, Colour, Pen, Sheet

WIDTH, HEIGHT, MARGIN, DOT = 1200, 640, 70, 9.0
SIZE = 15.0  # of letters
COLOURS: tuple[Colour, ...] = (QUIET, ACCENT, SOFT, (207, 34, 46), (26, 127, 55), (130, 80, 223))


def figure(points: Sequence[tuple[float, float, str]], dense: float) -> Sheet:
    """Points of milliseconds, radians and the encoder's name; `dense` is the dense model's time."""
    sheet = Sheet(WIDTH, HEIGHT, Pen())
    right = max(dense, *(ms for ms, _, _ in points))
    top = max(1e-6, *(loss for _, loss, _ in points))
    left, base = float(MARGIN), float(HEIGHT - MARGIN)
    wide, tall = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN
    for part in range(5):
        y, x = base - tall * part / 4, left + wide * part / 4
        sheet.box(left, y, wide, 1, GHOST)
        sheet.text(8, y + 5, f"{top * part / 4:.3f}", SIZE, QUIET)
        sheet.text(x - 14, base + 22, f"{right * part / 4:.0f}", SIZE, QUIET)
    sheet.text(8, MARGIN - 30, "predicted loss, radians", SIZE, INK)
    sheet.text(left, HEIGHT - 18, f"milliseconds to the first token; dense {dense:.0f}", SIZE, INK)
    sheet.box(left + wide * dense / right, MARGIN, 1, tall, QUIET)
    names = list(dict.fromkeys(name for _, _, name in points))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    for ms, loss, name in points:
        x, y = left + wide * ms / right, base - tall * loss / top
        sheet.box(x - DOT / 2, y - DOT / 2, DOT, DOT, colours[name])
    for row, name in enumerate(names):
        x, y = WIDTH - MARGIN - 330, MARGIN + 22 * row
        sheet.box(x, y, 12, 12, colours[name])
        sheet.text(x + 20, y + 12, name, SIZE, INK)
    return sheet
