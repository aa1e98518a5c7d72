"""Pictures become the same pixels as with transformers, and bad files one clear line."""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_utils import load_image as transformers_load_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from edgeprune.bundle import ImageRecord
from edgeprune.errors import InputError, ModelError
from edgeprune.export.preprocess import image_record
from edgeprune.runtime import images
from edgeprune.runtime.images import load_image, to_pixels


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
PLAIN = image_record(PROCESSORS["demo"])


def noise(*shape: int, dtype: Any = np.uint8) -> np.ndarray:
    top = np.iinfo(dtype).max
    return np.random.default_rng(0).integers(0, top, shape, dtype=dtype, endpoint=True)


def reference(processor: Any, source: Path | Image.Image) -> np.ndarray:
    if isinstance(source, Path):
        with Image.open(source) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about palettes
            source = transformers_load_image(file)
    return np.asarray(processor(images=source, return_tensors="np")["pixel_values"])


def assert_equal(processor: Any, source: Path | Image.Image) -> None:
    record = image_record(processor)
    image = load_image(source) if isinstance(source, Path) else source
    pixels = to_pixels(image, record)
    assert pixels.dtype == np.float32
    assert pixels.shape == (1, 3, record.height, record.width)
    np.testing.assert_array_equal(pixels, reference(processor, source))


SIZES = [(1, 1), (3, 500), (90, 3), (336, 336), (337, 335), (1, 2), (640, 480), (700, 501)]


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_size_is_bit_equal(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.fromarray(noise(size[1], size[0], 3)).save(path, compress_level=0)
    assert_equal(PROCESSORS[name], path)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from(sorted(PROCESSORS)))
def test_any_small_picture_is_bit_equal(width: int, height: int, name: str) -> None:
    assert_equal(PROCESSORS[name], Image.fromarray(noise(height, width, 3)))


def test_a_large_picture_is_bit_equal(tmp_path: Path) -> None:
    path = tmp_path / "large.bmp"
    Image.fromarray(noise(500, 4000, 3)).resize((4000, 3000)).save(path)
    assert_equal(PROCESSORS["llava-1.5"], path)


def palette() -> Image.Image:
    return Image.fromarray(noise(40, 50, 3)).quantize(16)


MODES: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
    "grayscale": (Image.fromarray(noise(40, 50)), "png", {}),
    "grayscale with a transparent level": (
        Image.fromarray(noise(4, 5)),
        "png",
        {"transparency": 9},
    ),
    "grayscale and alpha": (Image.fromarray(noise(40, 50, 4)).convert("LA"), "png", {}),
    "RGB with a transparent colour": (
        Image.fromarray(noise(40, 50, 3) // 128),
        "png",
        {"transparency": (0, 1, 0)},
    ),
    "RGBA": (Image.fromarray(noise(40, 50, 4)), "png", {}),
    "CMYK": (Image.fromarray(noise(40, 50, 4), mode=None).convert("CMYK"), "jpg", {}),
    "palette": (palette(), "png", {}),
    "palette with one transparent colour": (palette(), "png", {"transparency": 3}),
    "palette with transparencies": (palette(), "png", {"transparency": bytes(range(0, 256, 16))}),
    "GIF": (palette(), "gif", {"transparency": 2}),
    "16 bit": (Image.fromarray(noise(40, 50, dtype=np.uint16) // 100), "png", {}),
    "16 bit TIFF": (Image.fromarray(noise(40, 50, dtype=np.uint16)), "tiff", {}),
    "floating point": (Image.fromarray(noise(40, 50).astype(np.float32)), "tiff", {}),
    "1 bit": (Image.fromarray(noise(40, 50) > 99), "png", {}),
    "WebP": (Image.fromarray(noise(40, 50, 4)), "webp", {}),
    "BMP": (Image.fromarray(noise(40, 50, 3)), "bmp", {}),
}


@pytest.mark.parametrize("case", MODES)
def test_every_mode_is_bit_equal(case: str, tmp_path: Path) -> None:
    image, suffix, options = MODES[case]
    path = tmp_path / f"picture.{suffix}"
    image.save(path, **options)
    assert load_image(path).mode == "RGB"
    assert_equal(PROCESSORS["llava-1.5"], path)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "P", "1", "YCbCr"])
def test_pictures_in_memory_are_bit_equal(mode: str) -> None:
    assert_equal(PROCESSORS["demo"], Image.fromarray(noise(40, 50, 4)).convert("RGB").convert(mode))
    assert_equal(PROCESSORS["demo"], Image.fromarray(noise(40, 50, 4)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(noise(40, 64, 3)).save(path, exif=exif)
    assert load_image(path).size == ((64, 40) if orientation < 5 else (40, 64))
    assert_equal(PROCESSORS["demo"], path)


def png_header(width: int, height: int) -> bytes:
    """The start of a PNG that claims a size and holds almost nothing."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(100))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in (body, data)
    )


@pytest.mark.parametrize(
    "size", [(20_000, 20_000), (10_000, 9_500), (12_000, 9_000), (2**31 - 1, 1)], ids=str
)
def test_a_bomb_is_refused_unread(
    size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(*size))
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("it was decoded"))
    monkeypatch.setattr(images, "MAX_PIXELS", 90_000_000)
    with pytest.raises(InputError, match="at most 90,000,000 are read"):
        load_image(path)


BAD_FILES = {
    "empty": (b"", "is empty"),
    "text": (b"I am not a picture.\n" * 9, "not a picture in a format"),
    "header only": (png_header(9, 9)[:20], "read as a picture|not a picture"),
    "no pixels": (png_header(9, 9), "cannot be read as a picture"),
    "program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture in a format"),
    "zip": (b"PK\x03\x04" + bytes(99), "not a picture in a format"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_give_one_line(case: str, tmp_path: Path) -> None:
    content, message = BAD_FILES[case]
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_image(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tiff", "webp"])
def test_a_truncated_file_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"picture.{suffix}"
    Image.fromarray(noise(90, 90, 3)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=r"cannot be read|not a picture"):
        load_image(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, message in [
        ("", "is a folder"),
        ("absent.png", "no picture at"),
        ("a\0b", "no picture at"),
        ("x" * 999, "cannot be read|no picture at"),
        ("pipe", "a device or a pipe"),
    ]:
        with pytest.raises(InputError, match=message):
            load_image(tmp_path / name)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_a_damaged_file_gives_a_picture_or_our_error(tmp_path: Path, data: st.DataObject) -> None:
    suffix = data.draw(st.sampled_from(["png", "jpg", "gif", "bmp", "tiff", "webp", "ppm", "ico"]))
    path = tmp_path / f"picture.{suffix}"
    Image.fromarray(noise(20, 30, 3)).save(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        assert load_image(path).mode == "RGB"
    except InputError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["llava-1.5", "padded"])
def test_an_extreme_shape_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="too long and narrow"):
        to_pixels(Image.new("RGB", (60_000, 1)), image_record(PROCESSORS[name]))


def test_without_resizing_the_size_must_fit() -> None:
    record = replace(PLAIN, resize=None, crop=None, height=8, width=9)
    assert to_pixels(Image.new("RGB", (9, 8)), record).shape == (1, 3, 8, 9)
    with pytest.raises(InputError, match="takes pictures of 9 x 8"):
        to_pixels(Image.new("RGB", (8, 9)), record)


def test_the_record_of_llava() -> None:
    assert image_record(SimpleNamespace(image_processor=PROCESSORS["llava-1.5"])) == ImageRecord(
        height=336,
        width=336,
        resize=336,
        resample=3,
        crop=(336, 336),
        rescale=1 / 255,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
    )


REFUSED: dict[str, dict[str, Any]] = {
    "size": {"size": {"shortest_edge": 9, "longest_edge": 12}},
    "crop_size": {"crop_size": {"shortest_edge": 9}},
    "do_center_crop": {"do_center_crop": False},
    "do_pad": {"do_pad": True},
    "resample": {"resample": "cubic"},
    "rescale_factor": {"rescale_factor": 0},
    "image_mean": {"image_mean": [0.5, 0.5]},
    "image_std": {"image_std": [0.5, 0.5, 0.0]},
}


@pytest.mark.parametrize("setting", REFUSED)
def test_an_unsupported_setting_is_named(setting: str) -> None:
    processor = CLIPImageProcessorPil()
    for name, value in REFUSED[setting].items():
        setattr(processor, name, value)
    with pytest.raises(ModelError, match=f"image processor's {setting} is"):
        image_record(processor)


def test_another_processor_is_refused() -> None:
    with pytest.raises(ModelError, match="a SimpleNamespace, supported are: CLIPImageProcessor"):
        image_record(SimpleNamespace())
