"""An RGB image -> pixels [tiles, 3, height, width], equal to the checkpoint's own processor.

Equal means bit for bit what transformers computes with Pillow (its CLIPImageProcessorPil): the same
order of operations, the same filter, the same rounding. `edgeprune.images` reads the image.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeprune.errors import InputError
from edgeprune.images import MAX_PIXELS
from edgeprune.manifest import ImageRecord
from edgeprune.runtime.tiles import cut, on_black, shape_warning, views_warning
from edgeprune.tile_choice import chosen
from edgeprune.tile_views import arranged
from edgeprune.tiling import Size, longest, rounded, rounds_to


def to_pixels(image: Image.Image, record: ImageRecord) -> NDArray[np.float32]:
    """An RGB image padded, resized, cropped or cut as recorded: float32 of the record's shape."""
    if record.tiling is not None:
        views = cut(image, record.tiling, record.resample)
        seen = [_normalise(np.asarray(view), record) for view in views]
        return chosen(arranged(seen, record.tiling), record.tiling)
    if record.longest_edge is not None:
        height, width = longest(Size(image.height, image.width), record.longest_edge)
        image = image.resize((width, height), Image.Resampling(record.resample))
    if record.pad_to_square is not None:
        image = _pad_to_square(image, record.pad_to_square)
    if record.step is not None and not _rounds(image, record):
        image = on_black(image, Size(record.height, record.width), record.resample)
    if record.resize is not None:
        image = image.resize(_resized(image.size, record.resize), Image.Resampling(record.resample))
    if record.crop is not None:
        image = _center_crop(image, record.crop)
    if (image.height, image.width) != (record.height, record.width):
        raise InputError(
            f"this bundle takes images of {record.width} x {record.height} (width x height), this"
            f" one gives {image.width} x {image.height}; resize or crop it first"
        )
    return _normalise(np.asarray(image), record)


def warnings(image: Image.Image, record: ImageRecord) -> tuple[str, ...]:
    """What a user should know of how an image is taken; InputError where it cannot be."""
    given, tiling = Size(image.height, image.width), record.tiling
    better: Size | None
    if tiling is not None:
        frozen, better = Size(tiling.height, tiling.width), given
        suits = tiling.suits(*given)
        if tiling.crops is not None and tiling.crops.grid(given) == (1, 1):
            better = None  # the model's own processor does not cut it
    elif record.step is not None:
        frozen = Size(record.height, record.width)
        better = rounded(given, frozen.height * frozen.width, record.step)
        suits = _rounds(image, record)
    else:
        return ()
    warning = shape_warning(given, frozen, better, suits=suits)
    if not warning and record.view_rule is not None:
        warning = views_warning(given, record.views, record.view_rule)
    return (warning,) if warning else ()


def _rounds(image: Image.Image, record: ImageRecord) -> bool:
    frozen = Size(record.height, record.width)
    return rounds_to(Size(image.height, image.width), frozen, record.step or 1)


def _pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    side = max(image.size)
    _check_shape(image.size, (side, side))
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _resized(size: tuple[int, int], resize: tuple[int, int] | int) -> tuple[int, int]:
    """(width, height) after resizing; an int is the shorter edge, the longer is rounded down."""
    if not isinstance(resize, int):
        height, width = resize
        return width, height
    width, height = size
    long = int(resize * max(size) / min(size))
    new_size = (resize, long) if width <= height else (long, resize)
    _check_shape(size, new_size)
    return new_size


def _check_shape(size: tuple[int, int], new_size: tuple[int, int]) -> None:
    if math.prod(new_size) > MAX_PIXELS:
        raise InputError(
            f"an image of {size[0]:,} x {size[1]:,} pixels is too long and narrow: it would become"
            f" {new_size[0]:,} x {new_size[1]:,}; cut it into pieces"
        )


def _center_crop(image: Image.Image, crop: tuple[int, int]) -> Image.Image:
    """The middle (height, width); where the image is smaller, the rest is black."""
    height, width = crop
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _normalise(levels: NDArray[np.uint8], record: ImageRecord) -> NDArray[np.float32]:
    """(level * rescale - mean) / std, looked up: [height, width, 3] -> [1, 3, height, width]."""
    scaled = (np.arange(256, dtype=np.float64) * record.rescale).astype(np.float32)
    mean = np.array(record.mean, np.float32)[:, None]
    std = np.array(record.std, np.float32)[:, None]
    table = (scaled - mean) / std  # [3, 256]
    channels = levels.transpose(2, 0, 1)
    return np.stack([row[c] for row, c in zip(table, channels, strict=True)])[None]
