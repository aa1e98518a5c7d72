"""A checkpoint's image processor, read once and frozen as an ImageRecord.

Supported is what a static graph can take: a fixed number of pixels, reached by padding to a square,
resizing, a centre crop, scaling and normalising, in that order. Each reader below is for processors
of one kind. A family says which class of image processor is of which kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeprune.errors import ModelError
from edgeprune.manifest import ImageRecord
from edgeprune.models._stored import read_json
from edgeprune.tiling import Size, Tiling

Triple = tuple[float, float, float]
Reader = Callable[[Any], ImageRecord]
"""From an image processor of transformers to what it does; ModelError where it cannot be frozen."""


def read_image_processor(processor: Any, readers: Mapping[str, Reader]) -> ImageRecord:
    """What an image processor, or that of a processor, does to an image.

    `readers` has one for each class of image processor that a family is published with, by the
    class's name without the suffix of its implementation (`Fast`, `Pil`).
    """
    processor = getattr(processor, "image_processor", processor)
    name = type(processor).__name__
    reader = readers.get(name.removesuffix("Pil").removesuffix("Fast"))
    if reader is None:
        raise ModelError(
            f"the checkpoint's image processor is a {name}, supported are: {', '.join(readers)}"
        )
    return reader(processor)


def image_settings(folder: Path) -> dict[str, Any]:
    """Settings of a checkpoint's image processor, wherever its folder keeps them."""
    return settings_file(folder)[1]


def settings_file(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file with the settings of the image processor, and these; the folder where there is none.

    As in transformers, those among the settings of the whole processor go before a file of their
    own: of the two, that is what is written today.
    """
    whole, own = folder / "processor_config.json", folder / "preprocessor_config.json"
    settings = read_json(whole) if whole.is_file() else {}
    if isinstance(nested := settings.get("image_processor"), dict):
        return whole, nested
    return (own, read_json(own)) if own.is_file() else (folder, {})


def no_settings(folder: Path) -> ModelError:
    """The error about a folder that says nothing of its image processor."""
    return ModelError(
        f"{folder} says nothing of its image processor: neither preprocessor_config.json nor"
        " image_processor in processor_config.json; download these files too"
    )


def plain(processor: Any) -> ImageRecord:
    """Of a processor that resizes, crops out the centre and normalises, as CLIP's does."""
    if getattr(processor, "do_pad", None):
        raise unsupported("do_pad", True, "False")
    return _resized(processor, None)


def padded(processor: Any) -> ImageRecord:
    """The same where `do_pad` pads to a square of the mean colour first."""
    if not processor.do_pad:
        return _resized(processor, None)
    red, green, blue = _triple("image_mean", processor.image_mean)
    return _resized(processor, (int(red * 255), int(green * 255), int(blue * 255)))


def tiled(processor: Any, tiling: Tiling) -> ImageRecord:
    """Of a processor that cuts an image into tiles; edgeprune.tiling says how."""
    _check_tile(processor, tiling.tile)
    side, how = tiling.tile, resample(processor.resample)
    return ImageRecord(side, side, None, how, None, *levels(processor), tiling=tiling)


def rounded_size(processor: Any, frozen: Size, times: int = 1) -> ImageRecord:
    """Of a processor that keeps an image's size but for rounding: resizing to the frozen size.

    ModelError where the processor never makes that size; it may count a pixel several `times`.
    """
    if not processor.do_resize:
        raise unsupported("do_resize", False, "True")
    least, most = (count("size", processor.size[e]) for e in ("shortest_edge", "longest_edge"))
    least, most = -(-least // times), most // times
    pixels = frozen.height * frozen.width
    if not least <= pixels <= most:
        raise ModelError(
            f"--image-size {frozen.width}x{frozen.height} is {pixels:,} pixels, the checkpoint's"
            f" image processor makes {least:,} to {most:,}; choose another size"
        )
    how, (scale, mean, std) = resample(processor.resample), levels(processor)
    (height, width), step = frozen, processor.patch_size * processor.merge_size
    resize = height, width
    return ImageRecord(height, width, resize, how, None, scale, mean, std, step=step)


def _resized(processor: Any, pad: tuple[int, int, int] | None) -> ImageRecord:
    """Resizing and a centre crop, after padding to a square of the colour `pad` if any."""
    resize = _resize(processor.size) if processor.do_resize else None
    crop = _pair("crop_size", processor.crop_size) if processor.do_center_crop else None
    height, width = _fixed_size(resize, crop, square=pad is not None)
    how, values = resample(processor.resample), levels(processor)
    return ImageRecord(height, width, resize, how, crop, *values, pad_to_square=pad)


def levels(processor: Any) -> tuple[float, Triple, Triple]:
    """Factor, mean and deviation that levels of 0 to 255 are normalised with."""
    rescale, mean, std = 1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if processor.do_rescale:
        rescale = _number("rescale_factor", processor.rescale_factor)
    if processor.do_normalize:
        mean = _triple("image_mean", processor.image_mean)
        std = _triple("image_std", processor.image_std)
    return rescale, mean, std


def _check_tile(processor: Any, side: int) -> None:
    """ModelError unless tiles come out of the processor as large as the encoder takes them."""
    size = _resize(processor.size)
    crop = _pair("crop_size", processor.crop_size) if processor.do_center_crop else None
    square = (side, side)
    if not processor.do_resize or size not in (side, square) or crop not in (None, square):
        raise unsupported("size", _given(processor.size), f"the encoder's {side} pixels a side")


def _resize(size: Any) -> tuple[int, int] | int:
    given = _given(size)
    if set(given) == {"shortest_edge"}:
        return count("size", given["shortest_edge"])
    return _pair("size", size)


def _pair(name: str, size: Any) -> tuple[int, int]:
    given = _given(size)
    if set(given) != {"height", "width"}:
        also = " or shortest_edge" if name == "size" else ""
        raise unsupported(name, given, f"height and width{also}")
    return count(name, given["height"]), count(name, given["width"])


def _given(size: Any) -> dict[str, Any]:
    """The entries of a size that are set; transformers' SizeDict lists the others as None."""
    return {key: value for key, value in dict(size or {}).items() if value is not None}


def _fixed_size(
    resize: tuple[int, int] | int | None, crop: tuple[int, int] | None, *, square: bool
) -> tuple[int, int]:
    if crop is not None:
        return crop
    if isinstance(resize, tuple):
        return resize
    if resize is not None and square:
        return resize, resize
    raise unsupported("do_center_crop", False, "True, or a size with height and width")


def resample(value: Any) -> int:
    """Pillow's number of a filter."""
    try:
        return int(value)
    except (TypeError, ValueError):
        raise unsupported("resample", value, "Pillow's number of a filter") from None


def count(name: str, value: Any) -> int:
    """A setting that is a number of pixels."""
    if not isinstance(value, int) or value < 1:
        raise unsupported(name, value, "whole numbers of pixels")
    return value


def _number(name: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise unsupported(name, value, "a positive number")
    return float(value)


def _triple(name: str, value: Any) -> Triple:
    values = list(value) if isinstance(value, Sequence) else [value] * 3
    numbers = all(isinstance(v, (int, float)) and math.isfinite(v) for v in values)
    if len(values) != 3 or not numbers or (name == "image_std" and not all(values)):
        raise unsupported(name, value, "three numbers, and none that is divided by may be 0")
    red, green, blue = map(float, values)
    return red, green, blue


def unsupported(name: str, found: Any, wanted: str) -> ModelError:
    """The error about a setting that is not supported."""
    return ModelError(
        f"the image processor's {name} is {found!r}, supported is {wanted}; edit the checkpoint's"
        " preprocessor or processor configuration"
    )
