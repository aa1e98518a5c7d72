"""The checkpoint's image processor, read once and frozen as an ImageRecord.

Supported is what a static graph can take: a fixed number of pixels, reached by padding to a square,
resizing, a centre crop, scaling and normalising, in that order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from edgeprune.bundle import ImageRecord
from edgeprune.errors import ModelError
from edgeprune.tiling import Size, Tiling

PROCESSORS = ("CLIPImageProcessor", "LlavaImageProcessor", "SiglipImageProcessor")
"""Classes with the pipeline above, each also with the suffix that names its implementation."""
TILERS = ("GotOcr2ImageProcessor", "LlavaNextImageProcessor", "LlavaOnevisionImageProcessor")
"""Classes that cut a picture into tiles; edgeprune.tiling says how."""
ROUNDERS = ("Qwen2VLImageProcessor",)
"""Classes that keep a picture's size but for rounding; a bundle is frozen for one."""

Triple = tuple[float, float, float]


def image_record(
    processor: Any, tiling: Tiling | None = None, frozen: Size | None = None
) -> ImageRecord:
    """What the image processor of a checkpoint (or of its processor) does to a picture.

    `frozen` is the size of pictures that a processor leaves open.
    """
    processor = getattr(processor, "image_processor", processor)
    if frozen is not None:
        return _rounding(processor, frozen)
    _check_class(processor, PROCESSORS if tiling is None else TILERS)
    resample, levels = _resample(processor.resample), _levels(processor)
    if tiling is not None:
        _check_tile(processor, tiling.tile)
        return ImageRecord(tiling.tile, tiling.tile, None, resample, None, *levels, tiling=tiling)
    pad = _padding(processor)
    resize = _resize(processor.size) if processor.do_resize else None
    crop = _pair("crop_size", processor.crop_size) if processor.do_center_crop else None
    height, width = _fixed_size(resize, crop, square=pad is not None)
    return ImageRecord(height, width, resize, resample, crop, *levels, pad_to_square=pad)


def _rounding(processor: Any, frozen: Size) -> ImageRecord:
    """Resizing to the frozen size, which has to be one that the processor makes."""
    _check_class(processor, ROUNDERS)
    if not processor.do_resize:
        raise _unsupported("do_resize", False, "True")
    least, most = (_count("size", processor.size[e]) for e in ("shortest_edge", "longest_edge"))
    pixels = frozen.height * frozen.width
    if not least <= pixels <= most:
        raise ModelError(
            f"--image-size {frozen.width}x{frozen.height} is {pixels:,} pixels, the checkpoint's"
            f" image processor makes {least:,} to {most:,}; choose another size"
        )
    resample, (scale, mean, std) = _resample(processor.resample), _levels(processor)
    (height, width), step = frozen, processor.patch_size * processor.merge_size
    resize = height, width
    return ImageRecord(height, width, resize, resample, None, scale, mean, std, step=step)


def _levels(processor: Any) -> tuple[float, Triple, Triple]:
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
        raise _unsupported("size", _given(processor.size), f"the encoder's {side} pixels a side")


def _check_class(processor: Any, known: Sequence[str]) -> None:
    name = type(processor).__name__
    if name.removesuffix("Pil").removesuffix("Fast") not in known:
        raise ModelError(
            f"the checkpoint's image processor is a {name}, supported are: {', '.join(known)}"
        )


def _padding(processor: Any) -> tuple[int, int, int] | None:
    """LLaVA's processor pads to a square of the mean colour; the others' do_pad pads elsewhere."""
    if not getattr(processor, "do_pad", None):
        return None
    if not type(processor).__name__.startswith("Llava"):
        raise _unsupported("do_pad", True, "False, or LlavaImageProcessor's padding to a square")
    red, green, blue = _triple("image_mean", processor.image_mean)
    return int(red * 255), int(green * 255), int(blue * 255)


def _resize(size: Any) -> tuple[int, int] | int:
    given = _given(size)
    if set(given) == {"shortest_edge"}:
        return _count("size", given["shortest_edge"])
    return _pair("size", size)


def _pair(name: str, size: Any) -> tuple[int, int]:
    given = _given(size)
    if set(given) != {"height", "width"}:
        also = " or shortest_edge" if name == "size" else ""
        raise _unsupported(name, given, f"height and width{also}")
    return _count(name, given["height"]), _count(name, given["width"])


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
    raise _unsupported("do_center_crop", False, "True, or a size with height and width")


def _resample(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise _unsupported("resample", value, "Pillow's number of a filter") from None


def _count(name: str, value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise _unsupported(name, value, "whole numbers of pixels")
    return value


def _number(name: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise _unsupported(name, value, "a positive number")
    return float(value)


def _triple(name: str, value: Any) -> Triple:
    values = list(value) if isinstance(value, Sequence) else [value] * 3
    numbers = all(isinstance(v, (int, float)) and math.isfinite(v) for v in values)
    if len(values) != 3 or not numbers or (name == "image_std" and not all(values)):
        raise _unsupported(name, value, "three numbers, and none that is divided by may be 0")
    red, green, blue = map(float, values)
    return red, green, blue


def _unsupported(name: str, found: Any, wanted: str) -> ModelError:
    return ModelError(
        f"the image processor's {name} is {found!r}, supported is {wanted}; edit the checkpoint's"
        " preprocessor or processor configuration"
    )
