"""What pictures are drawn with: a pen (scale and font) and sheets, on Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, takewhile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from edgeprune.errors import InputError

Colour = tuple[int, int, int]
Point = tuple[float, float]  # x, y in pixels at scale 1

OVERSAMPLE = 2  # drawn so much larger, then averaged: smooth edges
PAPER: Colour = (255, 255, 255)
INK: Colour = (31, 35, 40)
QUIET: Colour = (101, 109, 118)
ACCENT: Colour = (9, 105, 218)
SOFT: Colour = (122, 173, 236)
GHOST: Colour = (238, 241, 245)


@dataclass(frozen=True, slots=True)
class Pen:
    """What everything is drawn with: dots for each pixel at scale 1, and a font file."""

    fine: int
    file: Path | None = None  # None: the one that Pillow brings along

    def font(self, size: float) -> ImageFont.FreeTypeFont:
        return _font(self.file, size)

    def length(self, text: str, size: float) -> float:
        """Width of a line in pixels at scale 1, the same at every scale."""
        return self.font(8 * size).getlength(text) / 8

    def wrap(self, text: str, size: float, width: float, most: int) -> list[str]:
        """Lines no wider than `width`, at most `most`: the last then ends in three dots."""

        def fits(line: str) -> bool:
            return self.length(line, size) <= width

        lines, line = list[str](), ""
        for word in text.split():
            if fits(f"{line} {word}".strip()):
                line = f"{line} {word}".strip()
                continue
            lines += [line] if line else []
            while not fits(word):
                end = _fitting(word, fits)
                lines.append(word[:end])
                word = word[end:]
            line = word
        lines += [line] if line else []
        if len(lines) > most:
            end = _fitting(lines[most - 1], lambda start: fits(start + "..."))
            lines[most - 1 :] = [lines[most - 1][:end] + "..."]
        return lines


@lru_cache(maxsize=32)
def _font(file: Path | None, size: float) -> ImageFont.FreeTypeFont:
    try:
        font = ImageFont.truetype(file, size) if file else ImageFont.load_default(size)
    except (OSError, ImportError) as error:
        raise InputError(
            f"the font {file or 'of Pillow'} cannot be used ({error}); name a .ttf or .otf: --font"
        ) from error
    assert isinstance(font, ImageFont.FreeTypeFont)  # the other kind has no size
    return font


def check_font(file: Path | None) -> None:
    """InputError, before any work, where a file is no font."""
    _font(file, 16)


def _fitting(text: str, fits: Callable[[str], bool]) -> int:
    """How many characters fit, at least one."""
    return max(takewhile(lambda end: fits(text[:end]), range(1, len(text) + 1)), default=1)


def _dashes(start: Point, end: Point, dash: float) -> list[tuple[Point, Point]]:
    """Pieces of `dash` length, as far apart, from `start` to `end`."""
    whole = math.dist(start, end)

    def at(length: float) -> Point:
        share = min(1.0, length / whole)
        return start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1])

    begins = (2 * dash * number for number in range(math.ceil(whole / (2 * dash))))
    return [(at(begin), at(begin + dash)) for begin in begins]


class Sheet:
    """A blank part of the picture; positions and sizes are in pixels at scale 1."""

    def __init__(self, width: float, height: float, pen: Pen) -> None:
        self.pen, self.width = pen, width
        self.image = Image.new("RGB", (round(width * pen.fine), round(height * pen.fine)), PAPER)
        self._draw = ImageDraw.Draw(self.image)

    def box(self, x: float, y: float, width: float, height: float, colour: Colour) -> None:
        edges = (round(v * self.pen.fine) for v in (x, y, x + width, y + height))
        left, top, right, bottom = edges
        if right > left and bottom > top:
            self._draw.rectangle((left, top, right - 1, bottom - 1), colour)

    def line(self, points: Sequence[Point], colour: Colour, width: float, dash: float = 0) -> None:
        """A line through points, its corners round; with `dash`, dashes and gaps of that length."""
        fine = self.pen.fine
        for start, end in pairwise(points):
            for a, b in _dashes(start, end, dash) if dash else [(start, end)]:
                ends = [(x * fine, y * fine) for x, y in (a, b)]
                self._draw.line(ends, colour, max(1, round(width * fine)))
        if not dash:
            for x, y in points[1:-1]:
                self.disc(x, y, width / 2, colour)

    def disc(self, x: float, y: float, radius: float, colour: Colour) -> None:
        fine = self.pen.fine
        edges = ((x - radius) * fine, (y - radius) * fine, (x + radius) * fine, (y + radius) * fine)
        self._draw.ellipse(edges, colour)

    def shape(self, points: Sequence[Point], colour: Colour) -> None:
        """A filled polygon."""
        self._draw.polygon([(x * self.pen.fine, y * self.pen.fine) for x, y in points], colour)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float,
        colour: Colour = INK,
        *,
        bold: bool = False,
        halo: float = 0,
    ) -> None:
        """One line; x is its left end, y its base line; a halo keeps off what is behind it."""
        if halo:
            self._text(x, y, text, size, PAPER, round(halo * self.pen.fine))
        self._text(x, y, text, size, colour, self.pen.fine // 2 if bold else 0)

    def _text(
        self, x: float, y: float, text: str, size: float, colour: Colour, stroke: int
    ) -> None:
        self._draw.text(
            (x * self.pen.fine, y * self.pen.fine),
            text,
            colour,
            self.pen.font(size * self.pen.fine),
            anchor="ls",
            stroke_width=stroke,
            stroke_fill=colour,
        )
