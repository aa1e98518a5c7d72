"""Images become the same pixels as with transformers, and bad files one clear line."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from edgeprune import rgb
from edgeprune.errors import InputError
from edgeprune.images import read_image
from edgeprune.manifest import ImageRecord
from tests.processors import (
    PROCESSORS,
    assert_equal,
    image_record,
    noise,
)

SIZES = [(1, 1), (3, 500), (90, 3), (336, 336), (337, 335), (1, 2), (640, 480), (700, 501)]


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_size_is_bit_equal(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.fromarray(noise(size[1], size[0], 3)).save(path, compress_level=0)
    assert_equal(PROCESSORS[name], path)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from(sorted(PROCESSORS)))
def test_any_small_image_is_bit_equal(width: int, height: int, name: str) -> None:
    assert_equal(PROCESSORS[name], Image.fromarray(noise(height, width, 3)))


def test_a_large_image_is_bit_equal(tmp_path: Path) -> None:
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
    "1 bit": (Image.fromarray(noise(40, 50) > 99), "png", {}),
    "WebP": (Image.fromarray(noise(40, 50, 4)), "webp", {}),
    "BMP": (Image.fromarray(noise(40, 50, 3)), "bmp", {}),
}


@pytest.mark.parametrize("case", MODES)
def test_every_mode_is_bit_equal(case: str, tmp_path: Path) -> None:
    image, suffix, options = MODES[case]
    path = tmp_path / f"image.{suffix}"
    image.save(path, **options)
    assert read_image(path).image.mode == "RGB"
    assert_equal(PROCESSORS["llava-1.5"], path)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "P", "1", "YCbCr"])
def test_images_in_memory_are_bit_equal(mode: str) -> None:
    assert_equal(PROCESSORS["demo"], Image.fromarray(noise(40, 50, 4)).convert("RGB").convert(mode))
    assert_equal(PROCESSORS["demo"], Image.fromarray(noise(40, 50, 4)))


def tiff(levels: np.ndarray, bits: int, kind: int, photometric: int = 1) -> bytes:
    """A TIFF of one row of grey levels; kind 1 is unsigned, 2 signed, 3 float."""
    data = levels.tobytes()
    if bits == 12:
        packed = "".join(f"{level:012b}" for level in levels.tolist())
        data = int(packed, 2).to_bytes(len(packed) // 8, "big")
    tags = [(256, len(levels)), (257, 1), (258, bits), (259, 1), (262, photometric)]
    tags += [(273, 8 + 2 + 12 * 10 + 4), (277, 1), (278, 1), (279, len(data)), (339, kind)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def png(depth: int, colour: int, row: bytes, width: int, transparent: bytes = b"") -> bytes:
    """A PNG of one row as it is stored."""
    header = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    if transparent:
        chunks.insert(1, (b"tRNS", transparent))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def pgm(*levels: int, white: int) -> bytes:
    return f"P5 {len(levels)} 1 {white}\n".encode() + struct.pack(f">{len(levels)}H", *levels)


DEEP = np.array([0, 32768, 65535], "<u2")
VIEWED: dict[str, tuple[bytes | Image.Image | np.ndarray, list[int], str]] = {
    # what is read, the grey levels that a viewer shows, what the warning holds
    "16-bit PNG": (png(16, 0, DEEP.byteswap().tobytes(), 3), [0, 128, 255], "65,535 is white"),
    "16-bit TIFF": (tiff(DEEP, 16, 1), [0, 128, 255], "65,535 is white"),
    "16-bit TIFF, white is zero": (tiff(DEEP, 16, 1, 0), [255, 127, 0], "65,535 is white"),
    "12-bit TIFF": (tiff(DEEP[[0, 1, 1, 2]] // 16, 12, 1), [0, 128, 128, 255], "4,095 is white"),
    "32-bit TIFF": (
        tiff(np.array([0, 1 << 31, (1 << 32) - 1], "<u4"), 32, 1),
        [0, 128, 255],
        "4.29497e+09 is white",
    ),
    "float TIFF": (tiff(np.array([0, 0.25, 0.5], "<f4"), 32, 3), [0, 64, 128], "1 is white"),
    "float TIFF of a sensor": (
        tiff(np.array([-20, 30, 80], "<f4"), 32, 3),
        [0, 128, 255],
        "-20 is black, 80 is white",
    ),
    "float TIFF of one level": (tiff(np.full(2, 7, "<f4"), 32, 3), [0, 0], "7 is black"),
    "16-bit PGM": (pgm(0, 32768, 65535, white=65535), [0, 128, 255], "65,535 is white"),
    "10-bit PGM": (pgm(0, 512, 1023, white=1023), [0, 128, 255], "65,535 is white"),
    "16-bit image in memory": (Image.fromarray(DEEP[None]), [0, 128, 255], "65,535 is white"),
    "float image in memory": (
        Image.fromarray(np.array([[0, 0.25, 0.5]], np.float32)),
        [0, 64, 128],
        "1 is white",
    ),
    "16-bit array": (DEEP[None].astype(np.uint16), [0, 128, 255], "65,535 is white"),
    "float array": (np.array([[0, 0.25, 1.0]]), [0, 64, 255], ""),
    "array of truths": (np.array([[[True], [False]]]), [255, 0], ""),
    "array with alpha": (np.array([[[0, 0], [0, 255]]], np.uint8), [255, 0], "on white"),
    "opaque alpha": (np.array([[[7, 255], [9, 255]]], np.uint8), [7, 9], ""),
    "16-bit PNG with a clear level": (
        png(16, 0, DEEP.byteswap().tobytes(), 3, struct.pack(">H", 0)),
        [255, 128, 255],
        "on white",
    ),
    "4-bit PNG with a clear level": (
        png(4, 0, bytes([0x5F]), 2, struct.pack(">H", 5)),
        [255, 255],
        "on white",
    ),
    "16-bit RGB PNG with a clear colour": (
        png(
            16,
            2,
            struct.pack(">6H", 300, 300, 300, 700, 700, 700),
            2,
            struct.pack(">3H", *[300] * 3),
        ),
        [255, 2],
        "on white",
    ),
    "colours multiplied by alpha": (Image.new("RGBa", (1, 1), (50, 50, 50, 100)), [205], "white"),
}


@pytest.mark.parametrize("case", VIEWED)
def test_a_model_sees_what_a_viewer_shows(case: str, tmp_path: Path) -> None:
    source, shown, told = VIEWED[case]
    read = read_image(source)
    assert np.asarray(read.image).tolist() == [[[level] * 3 for level in shown]]
    assert any(told in warning for warning in read.warnings) if told else not read.warnings
    if isinstance(source, bytes):
        (path := tmp_path / "image").write_bytes(source)
        with Image.open(path) as opened:  # by Pillow, and then handed over
            assert np.array_equal(read_image(opened).image, read.image)
        assert read_image(path).warnings == read.warnings
        assert np.array_equal(read_image(path).image, read.image)


def test_dark_text_on_a_transparent_ground_can_be_read(tmp_path: Path) -> None:
    image = Image.new("RGBA", (200, 60), (0, 0, 0, 0))
    ImageDraw.Draw(image).text((10, 10), "STOP", fill=(0, 0, 0, 255))
    image.save(path := tmp_path / "sign.png")
    for source in (path, path.read_bytes(), image, np.asarray(image)):
        read = read_image(source)
        assert read.image.getpixel((0, 0)) == (255, 255, 255)
        assert read.image.getextrema()[0][0] < 50
        assert read.warnings == ("transparent parts of the image are shown on white",)


def test_strips_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [noise(40, 30, 4), noise(40, 30, dtype=np.uint16)]
    whole = [np.asarray(read_image(source).image) for source in sources]
    monkeypatch.setattr(rgb, "STRIP", 100)
    for source, wanted in zip(sources, whole, strict=True):
        np.testing.assert_array_equal(read_image(source).image, wanted)


def test_of_several_frames_the_first_is_used(tmp_path: Path) -> None:
    frames = [Image.new("L", (9, 9), level) for level in (10, 90, 200)]
    for suffix in ("gif", "png", "tiff", "webp"):
        path = tmp_path / f"frames.{suffix}"
        options = {"lossless": True} if suffix == "webp" else {}
        frames[0].save(path, save_all=True, append_images=frames[1:], **options)
        read = read_image(path)
        assert read.image.getpixel((4, 4)) == (10, 10, 10)
        assert read.warnings == ("the image holds several frames; the first one is used",)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(noise(40, 64, 3)).save(path, exif=exif)
    read = read_image(path)
    assert read.image.size == ((64, 40) if orientation < 5 else (40, 64))
    assert bool(read.warnings) == (orientation > 1)
    assert_equal(PROCESSORS["demo"], path)
    with Image.open(path) as opened:
        assert np.array_equal(read_image(opened).image, read.image)
        opened.save(tiff_path := path.with_suffix(".tiff"), exif=exif)  # Pillow turns it by itself
    assert read_image(tiff_path).warnings == read.warnings


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


def test_levels_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="holds levels that are not finite numbers"):
        read_image(tiff(np.array([0, np.nan, 1], "<f4"), 32, 3))
