"""Image processors of transformers, and ours beside them."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from edgeprune.images import read_image
from edgeprune.models._image_record import padded, plain, read_image_processor
from edgeprune.runtime.images import to_pixels


def square_of(edge: int) -> dict[str, Any]:
    return {"size": {"shortest_edge": edge}, "crop_size": {"height": edge, "width": edge}}


PROCESSORS = {
    "demo": CLIPImageProcessorPil(
        **square_of(168), image_mean=[0.5, 0.5, 0.5], image_std=[0.25, 0.25, 0.25]
    ),
    "llava-1.5": CLIPImageProcessorPil(**square_of(336)),
    "padded": LlavaImageProcessorPil(**square_of(336), do_pad=True),
    "siglip": SiglipImageProcessorPil(size={"height": 40, "width": 56}),
    "uneven crop": CLIPImageProcessorPil(
        size={"shortest_edge": 30}, crop_size={"height": 41, "width": 24}
    ),
    "crop only": CLIPImageProcessorPil(do_resize=False, crop_size={"height": 31, "width": 64}),
    "raw levels": CLIPImageProcessorPil(**square_of(20), do_rescale=False, do_normalize=False),
    "bilinear": CLIPImageProcessorPil(**square_of(50), resample=2, rescale_factor=1 / 127.5),
}


READERS = {
    "CLIPImageProcessor": plain,
    "SiglipImageProcessor": plain,
    "LlavaImageProcessor": padded,
}


image_record = partial(read_image_processor, readers=READERS)


PLAIN = image_record(PROCESSORS["demo"])


def noise(*shape: int, dtype: Any = np.uint8) -> np.ndarray:
    top = np.iinfo(dtype).max
    return np.random.default_rng(0).integers(0, top, shape, dtype=dtype, endpoint=True)


def reference(processor: Any, source: Path | Image.Image) -> np.ndarray:
    """Pixels of transformers' image processor, which shows what is transparent on white."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about palettes
        if isinstance(source, Path):
            with Image.open(source) as file:
                source = ImageOps.exif_transpose(file)
        return np.asarray(processor(images=source, return_tensors="np")["pixel_values"])


def assert_equal(processor: Any, source: Path | Image.Image) -> None:
    record = image_record(processor)
    pixels = to_pixels(read_image(source).image, record)
    assert pixels.dtype == np.float32
    assert pixels.shape == (1, 3, record.height, record.width)
    np.testing.assert_array_equal(pixels, reference(processor, source))
