"""A sheet is a list of marks with positions in pixels at scale 1; a pen knows how wide text is.

`png` and `svg` turn a sheet into a file, so a figure is laid out once for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ImageFont

from edgeprune.errors import InputError

Colour = tuple[int, int, int]
Point = tuple[float, float]  # x, y in pixels at scale 1
Levels = NDArray[np.uint8]  # [height, width, 3]
Pixels = Callable[[int, int], Levels]  # width and height in dots -> an image of that size

PAPER: Colour = (255, 255, 255)
INK: Colour = (31, 35, 40)
QUIET: Colour = (101, 109, 118)
ACCENT: Colour = (9, 105, 218)
SOFT: Colour = (122, 173, 236)
GHOST: Colour = (238, 241, 245)
LOSS: Colour = (252, 224, 190)  # of bars behind others


@dataclass(frozen=True, slots=True)
class Pen:
    """The font of a sheet, and how wide its text is."""

    file: Path | None = None  # None: the font of Pillow

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


@dataclass(frozen=True, slots=True)
class Box:
    """A filled rectangle."""

    x: float
    y: float
    width: float
    height: float
    colour: Colour


@dataclass(frozen=True, slots=True)
class Line:
    """A line through points with round corners; with `dash`, dashes and gaps of that length."""

    points: tuple[Point, ...]
    colour: Colour
    width: float
    dash: float


@dataclass(frozen=True, slots=True)
class Disc:
    """A filled circle."""

    x: float
    y: float
    radius: float
    colour: Colour


@dataclass(frozen=True, slots=True)
class Polygon:
    """A filled polygon."""

    points: tuple[Point, ...]
    colour: Colour


@dataclass(frozen=True, slots=True)
class Text:
    """One line of text: x is its left end, y its base line."""

    x: float
    y: float
    text: str
    size: float
    colour: Colour
    bold: bool
    halo: float  # width of a border in the paper's colour, which hides what is behind the text


@dataclass(frozen=True, slots=True)
class Raster:
    """An image, made at the resolution that the file needs."""

    x: float
    y: float
    width: float
    height: float
    pixels: Pixels


@dataclass(frozen=True, slots=True)
class Placed:
    """A sheet on another one."""

    x: float
    y: float
    sheet: Sheet


Mark = Box | Line | Disc | Polygon | Text | Raster | Placed


class Sheet:
    """Marks in the order in which they are drawn."""

    def __init__(self, width: float, height: float, pen: Pen) -> None:
        self.width, self.height, self.pen = width, height, pen
        self.marks: list[Mark] = []

    def box(self, x: float, y: float, width: float, height: float, colour: Colour) -> None:
        self.marks.append(Box(x, y, width, height, colour))

    def line(self, points: Sequence[Point], colour: Colour, width: float, dash: float = 0) -> None:
        self.marks.append(Line(tuple(points), colour, width, dash))

    def disc(self, x: float, y: float, radius: float, colour: Colour) -> None:
        self.marks.append(Disc(x, y, radius, colour))

    def shape(self, points: Sequence[Point], colour: Colour) -> None:
        self.marks.append(Polygon(tuple(points), colour))

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
        self.marks.append(Text(x, y, text, size, colour, bold, halo))

    def raster(self, x: float, y: float, width: float, height: float, pixels: Pixels) -> None:
        self.marks.append(Raster(x, y, width, height, pixels))

    def place(self, x: float, y: float, sheet: Sheet) -> None:
        self.marks.append(Placed(x, y, sheet))
