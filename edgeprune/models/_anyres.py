"""LLaVA's way to high resolution: a view of the whole image, then its tiles as one large raster.

Rows and columns of the raster that show nothing but padding are left out, and each row ends in a
newline token of the model's own.
"""

from __future__ import annotations

from collections.abc import Iterable

from edgeprune.errors import SpecError
from edgeprune.models._encoder import EncoderConfig
from edgeprune.models._layout import NEWLINE, Layout
from edgeprune.tiling import Size, Tiling, fit_canvas, fitted, shown

ONE_RASTER = (
    "rows of visual tokens run across tiles and end with a newline, so without a tile their number"
    " would depend on the image, and the decoder could not tell columns apart"
)
"""Why no tile is left out."""


def anyres_tiling(choices: Iterable[Iterable[int]], encoder: EncoderConfig, size: Size) -> Tiling:
    """The tiles of an image of `size`; `choices` are heights and widths of a canvas in pixels."""
    canvas = fit_canvas(size, [Size(*choice) for choice in choices])
    tiling = Tiling(
        kind="fit",
        rows=canvas.height // encoder.image,
        columns=canvas.width // encoder.image,
        height=size.height,
        width=size.width,
        tile=encoder.image,
        tokens=encoder.side,
        overview="first",
    )
    if min(fitted(size, canvas)) < encoder.patch:
        raise SpecError(
            f"--image-size {size.width}x{size.height} is too long and narrow: fitted into tiles it"
            f" is less than a patch of {encoder.patch} pixels wide"
        )
    return tiling


def anyres_layout(tiling: Tiling) -> Layout:
    """The reading order: the whole image, then row after row of the raster."""
    side = tiling.tokens
    top, left, height, width = shown(tiling.grid, Size(tiling.height, tiling.width))
    order = list(range(side**2))
    for y in range(top, top + height):
        for x in range(left, left + width):
            tile = 1 + y // side * tiling.columns + x // side
            order.append(tile * side**2 + y % side * side + x % side)
        order.append(NEWLINE)
    return Layout(tiling.tiles, side, 1, tuple(order), (1, len(order)), newline=True)
