"""A sheet as an image of dots: drawn larger, then averaged, which makes edges smooth."""

from __future__ import annotations

import math
from itertools import pairwise

from PIL import Image, ImageDraw

from edgeprune.drawing.canvas import (
    PAPER,
    Box,
    Colour,
    Disc,
    Line,
    Placed,
    Point,
    Polygon,
    Raster,
    Sheet,
    Text,
)

OVERSAMPLE = 2


def render(sheet: Sheet, scale: int = 1) -> Image.Image:
    """The sheet at `scale` dots for each of its pixels."""
    fine = scale * OVERSAMPLE
    size = (sheet.width * fine, sheet.height * fine)
    width, height = (math.ceil(side / OVERSAMPLE) * OVERSAMPLE for side in size)
    image = Image.new("RGB", (width, height), PAPER)
    _Painter(image, fine).sheet(sheet, 0, 0)
    return image.reduce(OVERSAMPLE)


class _Painter:
    """Draws marks onto an image with `fine` dots for each pixel of the sheet."""

    def __init__(self, image: Image.Image, fine: int) -> None:
        self.image, self.fine, self.draw = image, fine, ImageDraw.Draw(image)

    def sheet(self, sheet: Sheet, left: float, top: float) -> None:
        for mark in sheet.marks:
            match mark:
                case Box():
                    self._box(mark, left, top)
                case Line():
                    self._line(mark, left, top)
                case Disc():
                    self._disc((mark.x + left, mark.y + top), mark.radius, mark.colour)
                case Polygon():
                    self.draw.polygon(self._dots(mark.points, left, top), mark.colour)
                case Text():
                    self._text(mark, sheet, left, top)
                case Raster():
                    self._raster(mark, left, top)
                case Placed():
                    self.sheet(mark.sheet, left + mark.x, top + mark.y)

    def _dots(self, points: tuple[Point, ...], left: float, top: float) -> list[Point]:
        return [((x + left) * self.fine, (y + top) * self.fine) for x, y in points]

    def _box(self, box: Box, left: float, top: float) -> None:
        x, y = box.x + left, box.y + top
        edges = (x, y, x + box.width, y + box.height)
        x0, y0, x1, y1 = (round(edge * self.fine) for edge in edges)
        if x1 > x0 and y1 > y0:
            self.draw.rectangle((x0, y0, x1 - 1, y1 - 1), box.colour)

    def _line(self, line: Line, left: float, top: float) -> None:
        points = [(x + left, y + top) for x, y in line.points]
        wide = max(1, round(line.width * self.fine))
        for start, end in pairwise(points):
            for piece in _dashes(start, end, line.dash) if line.dash else [(start, end)]:
                self.draw.line(self._dots(piece, 0, 0), line.colour, wide)
        for point in () if line.dash else points[1:-1]:
            self._disc(point, line.width / 2, line.colour)

    def _disc(self, centre: Point, radius: float, colour: Colour) -> None:
        (x, y), fine = centre, self.fine
        edges = ((x - radius) * fine, (y - radius) * fine, (x + radius) * fine, (y + radius) * fine)
        self.draw.ellipse(edges, colour)

    def _text(self, text: Text, sheet: Sheet, left: float, top: float) -> None:
        strokes = [(text.colour, self.fine // 2 if text.bold else 0)]
        if text.halo:
            strokes.insert(0, (PAPER, round(text.halo * self.fine)))
        for colour, stroke in strokes:
            self.draw.text(
                ((text.x + left) * self.fine, (text.y + top) * self.fine),
                text.text,
                colour,
                sheet.pen.font(text.size * self.fine),
                anchor="ls",
                stroke_width=stroke,
                stroke_fill=colour,
            )

    def _raster(self, raster: Raster, left: float, top: float) -> None:
        size = round(raster.width * self.fine), round(raster.height * self.fine)
        at = round((raster.x + left) * self.fine), round((raster.y + top) * self.fine)
        self.image.paste(Image.fromarray(raster.pixels(*size)), at)


def _dashes(start: Point, end: Point, dash: float) -> list[tuple[Point, Point]]:
    """Pieces of `dash` length, as far apart, from `start` to `end`."""
    whole = math.dist(start, end)

    def at(length: float) -> Point:
        share = min(1.0, length / whole)
        return start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1])

    begins = (2 * dash * number for number in range(math.ceil(whole / (2 * dash))))
    return [(at(begin), at(begin + dash)) for begin in begins]
