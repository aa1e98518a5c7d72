"""An image -> the tiles of a bundle, as the checkpoint's own processor would cut it.

A bundle's grid is frozen. An image whose shape asks for another grid is fitted into the image
size that the bundle is frozen for, its aspect ratio kept, on black; `shape_warning` says so.
"""

from __future__ import annotations

import math

from PIL import Image

from edgeprune.errors import InputError
from edgeprune.tiling import Size, Tiling, ViewRule, Views, fitted, longest

EXTREME = 8
"""An image so many times longer than the frozen shape is refused: next to nothing is left."""


def cut(image: Image.Image, tiling: Tiling, resample: int) -> list[Image.Image]:
    """Tiles row by row, the whole image first or last where the family has it: RGB."""
    if not tiling.suits(image.height, image.width):
        image = on_black(image, Size(tiling.height, tiling.width), resample)
    canvas, side = tiling.canvas, tiling.tile
    if tiling.crops is not None:
        views = [image, *cropped(image, tiling.rows, tiling.columns)]
        return [view.resize((side, side), Image.Resampling(resample)) for view in views]
    if tiling.longest_edge is not None:
        height, width = longest(Size(image.height, image.width), tiling.longest_edge)
        image = image.resize((width, height), Image.Resampling(resample))
    if tiling.kind == "fit":
        whole = on_black(image, canvas, resample)
    else:
        whole = image.resize((canvas.width, canvas.height), Image.Resampling(resample))
    corners = [
        (column * side, row * side)
        for row in range(tiling.rows)
        for column in range(tiling.columns)
    ]
    tiles = [whole.crop((x, y, x + side, y + side)) for x, y in corners]
    if tiling.overview == "none":
        return tiles
    seen = whole if tiling.kind == "round_up" else image
    height, width = tiling.overview_size or (side, side)
    overview = seen.resize((width, height), Image.Resampling(resample))
    return [overview, *tiles] if tiling.overview == "first" else [*tiles, overview]


def cropped(image: Image.Image, rows: int, columns: int) -> list[Image.Image]:
    """An image cut into parts of one size, row by row; the last may be some pixels smaller."""
    width, height = math.ceil(image.width / columns), math.ceil(image.height / rows)
    corners = [(x * width, y * height) for y in range(rows) for x in range(columns)]
    ends = [(min(x + width, image.width), min(y + height, image.height)) for x, y in corners]
    return [image.crop((*corner, *end)) for corner, end in zip(corners, ends, strict=True)]


def shape_warning(given: Size, frozen: Size, better: Size | None, *, suits: bool) -> str:
    """What is done with an image that does not suit the frozen shape; empty where it does.

    `better` is the size to export a bundle for, where there are more such images; None: that of
    the model, without --image-size.
    """
    ratio = frozen.width / frozen.height
    off = max(given.width / given.height / ratio, ratio * given.height / given.width)
    asked = f"--image-size {better.width}x{better.height}" if better else "no --image-size"
    if off > EXTREME:
        raise InputError(
            f"an image of {given.width:,} x {given.height:,} pixels is too long and narrow for"
            f" this bundle, made for {frozen.width} x {frozen.height}; cut it, or export with"
            f" {asked}"
        )
    if suits:
        return ""
    if given.height < frozen.height and given.width < frozen.width and 1 - 1 / off < 0.005:
        return (
            f"the image, {given.width} x {given.height}, is enlarged to the bundle's"
            f" {frozen.width} x {frozen.height}: so small, the model's own processor cuts it"
            " otherwise"
        )
    return (
        f"the image's shape, {given.width} x {given.height}, is not the bundle's,"
        f" {frozen.width} x {frozen.height}: {1 - 1 / off:.0%} of the tokens show black borders;"
        f" for such images export with {asked}"
    )


def views_warning(given: Size, frozen: Views, rule: ViewRule) -> str:
    """What the model's own processor makes of an image, where it is not what the bundle does; empty
    where it is."""
    own = rule.views(given)
    if own == frozen:
        return ""
    return (
        f"of an image of {given.width} x {given.height} the model's own processor makes"
        f" {rule.described(own)}, the bundle {rule.described(frozen)}; for such images export with"
        f" --image-size {given.width}x{given.height}"
    )


def on_black(image: Image.Image, size: Size, resample: int) -> Image.Image:
    height, width = fitted(Size(image.height, image.width), size)
    resized = image.resize((width, height), Image.Resampling(resample))
    canvas = Image.new("RGB", (size.width, size.height))
    canvas.paste(resized, ((size.width - width) // 2, (size.height - height) // 2))
    return canvas
