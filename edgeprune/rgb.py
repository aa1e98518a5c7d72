"""Pixels of any kind -> 8-bit RGB, upright, as a viewer would show them.

What a viewer would show is what the model must see. The rules:

- Transparent parts lie on white. Transformers' image processors (`convert_to_rgb`) and Qwen's
  `qwen_vl_utils` do the same. A plain `convert("RGB")`, which transformers' `load_image` and
  LLaVA's own scripts use on files, drops the alpha instead and shows what a drawing program left
  under it, often black text on black.
- Grey levels of 12 and 16 bits are scaled by their full range. `convert("RGB")` cuts them off at
  255.
- Levels without a range of their own (float, 32-bit integers) are scaled from 0 to 1 if they lie
  there, else from their smallest to their largest.
- The orientation that EXIF or XMP gives is applied.

Everything else is as `convert("RGB")` makes it, bit for bit.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeprune.errors import InputError

STRIP = 1 << 22
"""Pixels that are converted at a time, which bounds the memory beside the image itself."""

ALPHA = ("LA", "PA", "RGBA", "La", "RGBa")
"""Modes with alpha; a small `a` where colours are multiplied by it."""

TURNS = {
    Image.Transpose.FLIP_LEFT_RIGHT: "mirrored",
    Image.Transpose.ROTATE_180: "turned by 180 degrees",
    Image.Transpose.FLIP_TOP_BOTTOM: "mirrored and turned by 180 degrees",
    Image.Transpose.TRANSPOSE: "mirrored and turned by 90 degrees",
    Image.Transpose.ROTATE_270: "turned by 90 degrees clockwise",
    Image.Transpose.TRANSVERSE: "mirrored and turned by 270 degrees",
    Image.Transpose.ROTATE_90: "turned by 90 degrees counter-clockwise",
}
"""What is done to an image that lies, in the order of EXIF's orientations 2 to 8."""

_BY_TAG = dict(enumerate(TURNS, start=2))
_ORIENTATION = 0x0112  # of EXIF and TIFF
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF
_WHITE_IS_ZERO, _UNSIGNED = 0, 1


def to_rgb(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """An image as upright RGB, and what was done to it in words; the image itself is not changed.

    InputError where levels are not finite; what Pillow raises where the file is damaged.
    """
    stored, turned = _transparency(image), _turned_by_pillow(image)  # loading forgets both
    image.load()
    done: list[str] = []
    if image.mode[0] in "IF":
        rgb = _from_grey(image, stored, done)
    elif image.mode in ALPHA or stored is not None:
        rgb = _on_white(image, stored, done)
    else:
        rgb = image.convert("RGB")
    turn = _turn(image)
    if turn is not None:
        rgb = rgb.transpose(turn)
    applied = turned if turn is None else turn
    if applied is not None:
        done.append(f"the image is {TURNS[applied]}, as its orientation tag says")
    return rgb, tuple(done)


def _transparency(image: Image.Image) -> Any:
    """The transparent level, colour or palette entries, in levels of the decoded image, or None.

    Pillow leaves a PNG's as they are stored, but decodes 2 and 4 bits of grey to 8 and cuts 16 bits
    of colour to 8.
    """
    stored = image.info.get("transparency")
    tiles: Any = getattr(image, "tile", None)  # (codec, box, offset, raw mode) until it is loaded
    raw = tiles[0][3] if tiles and image.format == "PNG" else None
    if isinstance(stored, int) and raw in ("L;2", "L;4"):
        return stored % (1 << int(raw[-1])) * (85 if raw == "L;2" else 17)
    if isinstance(stored, tuple) and raw == "RGB;16B":
        return tuple(level >> 8 for level in stored)
    return stored


def _on_white(image: Image.Image, stored: Any, done: list[str]) -> Image.Image:
    """Transparent parts on white, a strip at a time, rounded as Pillow's alpha_composite does."""
    rgb, opaque = Image.new("RGB", image.size), True
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        strip = image.crop(box)
        if stored is not None:
            strip.info["transparency"] = stored
        if strip.mode.endswith("a"):
            strip = strip.convert(strip.mode[:-1] + "A")
        strip = strip.convert("RGBA")
        opaque &= strip.getchannel("A").getextrema() == (255, 255)
        white = Image.new("RGBA", strip.size, "white")
        rgb.paste(Image.alpha_composite(white, strip).convert("RGB"), box)
    if not opaque:
        done.append("transparent parts of the image are shown on white")
    return rgb


def _from_grey(image: Image.Image, stored: Any, done: list[str]) -> Image.Image:
    """Grey of more than 8 bits: modes I;16, I and F."""
    levels = np.asarray(image)
    tags = getattr(image, "tag_v2", None) or {}
    if image.mode == "I" and tags and tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))[0] == _UNSIGNED:
        levels = levels.view(np.uint32)  # Pillow has signed ones only
    transparent = levels == stored if isinstance(stored, int) else None
    grey = _scaled(levels, _white(image, tags), done)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        np.subtract(255, grey, out=grey)
    if transparent is not None and transparent.any():
        grey[transparent] = 255
        done.append("transparent parts of the image are shown on white")
    return Image.fromarray(grey).convert("RGB")


def _white(image: Image.Image, tags: Any) -> int | None:
    """The level that means white where the format says it."""
    if image.mode.startswith("I;16"):
        bits = tags.get(_BITS, (16,))[0]
        return (1 << bits) - 1 if 8 < bits <= 16 else 65_535
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return 65_535
    return None


def _scaled(levels: NDArray[Any], white: int | None, done: list[str]) -> NDArray[np.uint8]:
    """Levels [height, width] -> 8 bits, a strip at a time."""
    low, high = (0.0, float(white)) if white else (float(levels.min()), float(levels.max()))
    if not np.isfinite([low, high]).all():  # min and max pass NaN on
        raise InputError("holds levels that are not finite numbers; save it as 8-bit or 16-bit")
    if levels.dtype.kind == "f" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    grey = np.empty(levels.shape, np.uint8)
    rows = max(1, STRIP // levels.shape[1])
    for top in range(0, len(levels), rows):
        strip = levels[top : top + rows].astype(np.float64)
        strip = (strip - low) / ((high - low) or 1.0)
        grey[top : top + rows] = np.round(np.clip(strip, 0, 1) * 255)
    done.append(f"grey levels are scaled to 8 bits: {low:,.6g} is black, {high:,.6g} is white")
    return grey


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes a loaded image upright; nothing where its EXIF is damaged, as in viewers."""
    with suppress(Exception):
        return _BY_TAG.get(image.getexif().get(_ORIENTATION))  # type: ignore[arg-type]
    return None


def _turned_by_pillow(image: Image.Image) -> Image.Transpose | None:
    """What Pillow does to a TIFF file by itself when it is loaded."""
    tags: Any = getattr(image, "tag_v2", None) or {}
    return _BY_TAG.get(tags.get(_ORIENTATION))
