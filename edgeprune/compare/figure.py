"""The figure: accuracy against prefill time, a line for each method, its name at its end."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edgeprune.compare.labels import Box, column, placed
from edgeprune.compare.result_tables import grouped
from edgeprune.compare.results import Comparison, Result
from edgeprune.compare.titles import DENSE
from edgeprune.drawing.canvas import GHOST, INK, PAPER, QUIET, Colour, Pen, Point, Sheet
from edgeprune.intervals import wilson

WIDTH, HEIGHT, MARGIN = 1200, 800, 40  # in pixels at scale 1
SIZE = 17.0  # of letters
PALETTE: tuple[Colour, ...] = (
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (230, 159, 0),
    (86, 180, 233),
)
"""Told apart with every kind of colour vision (Okabe and Ito); for the methods most often right."""
FAINT: Colour = (173, 179, 186)
ONE_DIGIT = (1, 5, 2, 3, 7, 4, 6, 8, 9)
"""First digits of the numbers on an axis, the roundest first."""
TWO_DIGITS = (1.5, 2.5, 1.2, *(n / 10 for n in range(10, 100)))
THREE_DIGITS = tuple(n / 100 for n in range(100, 1000))
SPACES = ((ONE_DIGIT, 1), (TWO_DIGITS, 2), (THREE_DIGITS, 4))
"""How many ticks a gap has room for at least, before a number of so many digits goes there."""


@dataclass(frozen=True)
class Mark:
    """A method at a ratio, in the units of the axes: the share right in percent, and its ends."""

    cr: float
    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """A method, from its smallest ratio to its largest."""

    name: str
    marks: tuple[Mark, ...]
    colour: Colour = FAINT
    starred: bool = False  # a part of the published method is replaced

    @property
    def label(self) -> str:
        return f"{self.name} *" if self.starred else self.name

    @property
    def strong(self) -> bool:
        return self.colour != FAINT


@dataclass(frozen=True)
class Axes:
    """Where a value lies on the sheet. Both axes are logarithmic, y in the share that is wrong.

    So a speed-up is as wide, and half the errors as high, wherever it lies.
    """

    x: tuple[float, float]
    wrong: tuple[float, float]  # percent, below at the bottom and at the top
    box: Box

    def at(self, x: float, y: float) -> Point:
        across = math.log(x / self.x[0]) / math.log(self.x[1] / self.x[0])
        most, least = self.wrong
        up = math.log(most / max(100 - y, least)) / math.log(most / least)
        return self.box.left + across * self.box.width, self.box.bottom - up * self.box.height


def figure(comparison: Comparison) -> Sheet:
    """The whole figure, 1200 pixels wide.

    Without times the share of visual tokens that the decoder computes stands on the x axis.
    """
    cells = [cell for cell in comparison.cells if cell.asked]
    timed = any(cell.rounds for cell in cells)
    dense, curves = _curves(cells, timed)
    sheet = Sheet(WIDTH, HEIGHT, Pen())
    axes = _axes(dense, curves)
    _frame(sheet, axes, comparison, timed)
    if dense:
        _reference(sheet, axes, dense)
    ratios = sorted({mark.cr for curve in curves for mark in curve.marks})
    for curve in curves:
        _draw(sheet, axes, curve, ratios)
    _names(sheet, axes, curves, dense)
    _legend(sheet, axes, ratios, starred=any(curve.starred for curve in curves))
    return sheet


def _curves(cells: Sequence[Result], timed: bool) -> tuple[Mark | None, list[Curve]]:
    """The dense model, and the methods: those least often right first, so the others lie above."""
    marks: dict[str, list[Mark]] = {}
    starred = {_name(cell) for cell in cells if cell.stands_in}
    for group in grouped(cells):
        if group[0].rounds or not timed:
            marks.setdefault(_name(group[0]), []).append(_mark(group, timed))
    dense = marks.pop(DENSE, [None])[0]
    usual = {
        cr: statistics.mean(m.y for found in marks.values() for m in found if m.cr == cr)
        for cr in {mark.cr for found in marks.values() for mark in found}
    }

    def lead(name: str) -> float:
        """How much more often right than methods usually are, at the ratios that it reaches."""
        return statistics.mean(mark.y - usual[mark.cr] for mark in marks[name])

    best = sorted(marks, key=lead, reverse=True)
    colours = dict(zip(best, PALETTE, strict=False))
    curves = [
        Curve(name, tuple(marks[name]), colours.get(name, FAINT), name in starred) for name in best
    ]
    return dense, curves[::-1]


def _name(cell: Result) -> str:
    """What a line is called; the dense model with quantised weights or fewer tiles is one among
    them."""
    changed = cell.method == DENSE and cell.title != DENSE
    return f"dense{cell.title.removeprefix(DENSE)}" if changed else cell.title


def _mark(group: Sequence[Result], timed: bool) -> Mark:
    """Several draws: their mean and range. One: its share and 95% interval."""
    one = group[0]
    x = one.median("prefill") if timed else 100 / one.cr
    shares = [100 * cell.share for cell in group]
    low, high = (100 * end for end in wilson(*one.total))
    if len(group) > 1:
        low, high = min(shares), max(shares)
    return Mark(one.cr_asked, x, statistics.mean(shares), low, high)


def _axes(dense: Mark | None, curves: Iterable[Curve]) -> Axes:
    marks = [mark for curve in curves for mark in curve.marks] + ([dense] if dense else [])
    left, right = min(mark.x for mark in marks), max(mark.x for mark in marks)
    room = max(right / left, 1.2)  # on the left for names
    most = max(100 - mark.low for mark in marks)
    least = max(min(100 - mark.high for mark in marks), 0.3)
    box = Box(MARGIN + 54, MARGIN + 104, WIDTH - 2 * MARGIN - 74, HEIGHT - 2 * MARGIN - 160)
    return Axes((left / room**0.2, right * room**0.05), (1.1 * most, 0.95 * least), box)


def _frame(sheet: Sheet, axes: Axes, comparison: Comparison, timed: bool) -> None:
    """Title, grid and numbers."""
    setup, box = comparison.setup, axes.box
    against = "prefill time" if timed else "visual tokens computed"
    sheet.text(MARGIN, MARGIN + 24, f"Accuracy against {against}", 28, bold=True)
    caption = f"{setup['model']}, {setup['questions']:,} questions to each bundle"
    if timed:
        rounds = max(len(cell.rounds.get("prefill", ())) for cell in comparison.cells)
        caption += f", {rounds} timing rounds"
    caption += "; bars are 95% intervals; axes are logarithmic, the vertical one in errors"
    sheet.text(
        MARGIN, MARGIN + 54, sheet.pen.wrap(caption, SIZE, WIDTH - 2 * MARGIN, 1)[0], SIZE, QUIET
    )
    sheet.text(MARGIN, box.top - 16, "accuracy, %", SIZE, QUIET)
    unit = "prefill, ms" if timed else "visual tokens computed, %"
    below = box.right - sheet.pen.length(unit, SIZE)
    sheet.text(below, box.bottom + 52, unit, SIZE, QUIET)
    for wrong in ticks(axes.wrong[1], axes.wrong[0], box.height / 20):
        y = axes.at(axes.x[0], 100 - wrong)[1]
        sheet.line([(box.left, y), (box.right, y)], GHOST, 1)
        name = f"{100 - wrong:g}"
        sheet.text(box.left - 10 - sheet.pen.length(name, SIZE), y + 6, name, SIZE)
    sheet.line([(box.left, box.bottom), (box.right, box.bottom)], INK, 1)
    for value in ticks(*axes.x, box.width / 40):
        x = axes.at(value, 0)[0]
        sheet.line([(x, box.bottom), (x, box.bottom + 6)], INK, 1)
        name = f"{value:g}"
        sheet.text(x - sheet.pen.length(name, SIZE) / 2, box.bottom + 25, name, SIZE)


def ticks(low: float, high: float, most: float) -> list[float]:
    """Round numbers over the whole of a logarithmic axis that has room for `most`, in order.

    Digits 1 to 9 first, the roundest first; where they leave a gap of several ticks, as between 10
    and 20, numbers of two and of three digits.
    """
    found: list[float] = []
    apart = math.log(high / low) / most
    for digits, gap in SPACES:
        for value in (digit * 10.0**power for digit in digits for power in range(-3, 6)):
            near = (abs(math.log(value / other)) for other in found)
            if low <= value <= high and all(distance >= gap * apart for distance in near):
                found.append(value)
    return sorted(found)


def _reference(sheet: Sheet, axes: Axes, dense: Mark) -> None:
    """The dense model: a dashed line at its share, its point, its name."""
    sheet.line(_across(axes, dense), INK, 1.5, dash=6)
    sheet.disc(*axes.at(dense.x, dense.y), 6, INK)


def _across(axes: Axes, dense: Mark) -> list[Point]:
    y = axes.at(dense.x, dense.y)[1]
    return [(axes.box.left, y), (axes.box.right, y)]


def _draw(sheet: Sheet, axes: Axes, curve: Curve, ratios: Sequence[float]) -> None:
    points = [axes.at(mark.x, mark.y) for mark in curve.marks]
    sheet.line(points, curve.colour, 2.5 if curve.strong else 1.5)
    for mark, (x, y) in zip(curve.marks, points, strict=True):
        if curve.strong:
            ends = [(x, axes.at(mark.x, end)[1]) for end in (mark.low, mark.high)]
            sheet.line(ends, curve.colour, 1.5)
        _sign(sheet, x, y, ratios.index(mark.cr), curve.colour, 6 if curve.strong else 4.5)


def _sign(sheet: Sheet, x: float, y: float, number: int, colour: Colour, size: float) -> None:
    """The sign of the n-th ratio, with a pale edge: disc, square, triangle, diamond, and again."""
    if number % 4 == 0:
        sheet.disc(x, y, size + 1, PAPER)
        sheet.disc(x, y, size, colour)
        return
    corners, turn, grow = ((4, 45, 1.25), (3, -90, 1.35), (4, 0, 1.4))[number % 4 - 1]
    angles = [math.radians(turn + 360 * i / corners) for i in range(corners)]
    for radius, fill in ((size * grow + 1.5, PAPER), (size * grow, colour)):
        sheet.shape([(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles], fill)


def _names(sheet: Sheet, axes: Axes, curves: Sequence[Curve], dense: Mark | None) -> None:
    """Each method's name where its line ends, at its largest ratio, in the line's colour.

    Those that reach the largest ratio of all stand in a column on the left.
    """
    lines = [[axes.at(mark.x, mark.y) for mark in curve.marks] for curve in curves]
    names = [
        (c.label, c.marks[-1].cr, c.colour, line) for c, line in zip(curves, lines, strict=True)
    ]
    names.reverse()  # the best are placed first
    most = max((cr for _, cr, _, _ in names), default=0)
    reach = [(name, colour, line[-1]) for name, cr, colour, line in names if cr == most]
    others = [(name, colour, line[-1]) for name, cr, colour, line in names if cr != most]
    if dense:
        others.insert(0, (f"dense, {dense.y:.1f}", INK, axes.at(dense.x, dense.y)))
        lines.append(_across(axes, dense))
    left, free = (
        [(sheet.pen.length(name, SIZE), SIZE + 3, end) for name, _, end in some]
        for some in (reach, others)
    )
    listed = column(left, axes.box)
    chosen = [*listed, *placed(free, lines, axes.box, listed)]
    for (name, colour, end), box in zip([*reach, *others], chosen, strict=True):
        near = box.nearest(end)
        if math.dist(near, end) > 20 and box.right < end[0]:
            near = box.right + 4, box.top + box.height / 2
        if math.dist(near, end) > 20:
            sheet.line([near, end], colour, 0.75)
        shown = QUIET if colour == FAINT else colour
        sheet.text(box.left, box.bottom - 5, name, SIZE, shown, halo=2)


def _legend(sheet: Sheet, axes: Axes, ratios: Sequence[float], *, starred: bool) -> None:
    """Which sign is which ratio, and what a star is."""
    x, y = axes.box.left, axes.box.bottom + 52
    for number, ratio in enumerate(ratios):
        name = f"CR {ratio:g}"
        _sign(sheet, x + 6, y - 6, number, QUIET, 5)
        sheet.text(x + 18, y, name, SIZE, QUIET)
        x += 18 + sheet.pen.length(name, SIZE) + 24
    if starred:
        sheet.text(x, y, "* a part of the published method is replaced", SIZE, QUIET)
