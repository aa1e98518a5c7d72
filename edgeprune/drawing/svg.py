"""A sheet as SVG, for papers and pages: lines and text stay sharp at any size."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from xml.sax.saxutils import escape

from PIL import Image

from edgeprune.drawing.canvas import (
    ACCENT,
    GHOST,
    INK,
    LOSS,
    PAPER,
    QUIET,
    SOFT,
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

Paint = Callable[[Colour], str]  # what an attribute says of a colour
DOTS = 3
"""Dots of an embedded image for each pixel of the sheet."""


ROLES = {
    PAPER: "paper",
    INK: "ink",
    QUIET: "quiet",
    ACCENT: "accent",
    SOFT: "soft",
    GHOST: "ghost",
    LOSS: "loss",
}
"""Names of the colours that a page may set otherwise, as it does where it is dark."""


def inline(sheet: Sheet, label: str) -> str:
    """The figure as an element of a page, which sets its colours: `--paper` and so on.

    The label tells those who cannot see the figure what it shows.
    """
    size = f"{sheet.width:g} {sheet.height:g}"
    title = escape(printable(label), {'"': "&quot;"})
    head = f'<svg viewBox="0 0 {size}" role="img" aria-label="{title}">'
    return "\n".join([head, *_marks(sheet, 0, 0, _variable), "</svg>"])


def render(sheet: Sheet) -> str:
    """The whole file; text is as wide as the sheet's pen says, whatever font a viewer has."""
    size = f"{sheet.width:g} {sheet.height:g}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}"'
            ' font-family="Inter, Helvetica, Arial, sans-serif">',
            f'<rect width="100%" height="100%" fill="{_hex(PAPER)}"/>',
            *_marks(sheet, 0, 0, _hex),
            "</svg>\n",
        ]
    )


def _marks(sheet: Sheet, left: float, top: float, paint: Paint) -> Iterator[str]:
    for mark in sheet.marks:
        match mark:
            case Box():
                box = _box(mark, left, top)
                yield f'<rect {box} fill="{paint(mark.colour)}"/>'
            case Line():
                dash = f' stroke-dasharray="{mark.dash:g}"' if mark.dash else ""
                yield (
                    f'<polyline points="{_points(mark.points, left, top)}" fill="none"'
                    f' stroke="{paint(mark.colour)}" stroke-width="{mark.width:g}"'
                    f' stroke-linejoin="round"{dash}/>'
                )
            case Disc():
                centre = f'cx="{mark.x + left:.2f}" cy="{mark.y + top:.2f}"'
                yield f'<circle {centre} r="{mark.radius:g}" fill="{paint(mark.colour)}"/>'
            case Polygon():
                points = _points(mark.points, left, top)
                yield f'<polygon points="{points}" fill="{paint(mark.colour)}"/>'
            case Text():
                yield _text(mark, sheet, left, top, paint)
            case Raster():
                yield f'<image {_box(mark, left, top)} href="{_embedded(mark)}"/>'
            case Placed():
                yield from _marks(mark.sheet, left + mark.x, top + mark.y, paint)


def _box(mark: Box | Raster, left: float, top: float) -> str:
    x, y = mark.x + left, mark.y + top
    return f'x="{x:.2f}" y="{y:.2f}" width="{mark.width:.2f}" height="{mark.height:.2f}"'


def _points(points: tuple[Point, ...], left: float, top: float) -> str:
    return " ".join(f"{x + left:.2f},{y + top:.2f}" for x, y in points)


def _text(text: Text, sheet: Sheet, left: float, top: float, paint: Paint) -> str:
    halo = (
        f' stroke="{paint(PAPER)}" stroke-width="{2 * text.halo:g}" paint-order="stroke"'
        if text.halo
        else ""
    )
    bold = ' font-weight="600"' if text.bold else ""
    return (
        f'<text x="{text.x + left:.2f}" y="{text.y + top:.2f}" font-size="{text.size:g}"'
        f' fill="{paint(text.colour)}" textLength="{sheet.pen.length(text.text, text.size):.2f}"'
        f' lengthAdjust="spacingAndGlyphs"{bold}{halo}>{escape(printable(text.text))}</text>'
    )


def printable(text: str) -> str:
    """The text without characters that XML does not have."""
    return "".join(c for c in text if c.isprintable())


def _embedded(raster: Raster) -> str:
    """The image as PNG inside the file."""
    size = round(raster.width * DOTS), round(raster.height * DOTS)
    encoded = io.BytesIO()
    Image.fromarray(raster.pixels(*size)).save(encoded, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode()


def _variable(colour: Colour) -> str:
    """The page's own colour where it sets one."""
    role = ROLES.get(colour)
    return f"var(--{role}, {_hex(colour)})" if role else _hex(colour)


def _hex(colour: Colour) -> str:
    red, green, blue = colour
    return f"#{red:02x}{green:02x}{blue:02x}"
