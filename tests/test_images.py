"""Images become the same pixels as with transformers, and bad files one clear line."""

from __future__ import annotations

import io
import os
import re
import struct
import warnings
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageOps
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from edgeprune import images, rgb
from edgeprune.bundle import ImageRecord
from edgeprune.errors import InputError, ModelError
from edgeprune.images import image_in, read_image
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


WRONG_ARRAYS = {
    "want [height, width] or": np.zeros(9, np.uint8),
    "with 1 to 4 channels": np.zeros((3, 9, 9), np.uint8),
    "an array of int64 is no image": np.zeros((9, 9), np.int64),
    "an array of uint16 is no image": np.zeros((9, 9, 3), np.uint16),
    "run from 0 to 1; got -1 to 3": np.array([[-1.0, 3.0]]),
    "got nan to nan": np.array([[np.nan, 1.0]]),
    "is 9 x 0 pixels": np.zeros((0, 9), np.uint8),
    "at most 100,000,000 are read": np.broadcast_to(np.uint8(0), (20_000, 20_000)),
}


@pytest.mark.parametrize("message", WRONG_ARRAYS)
def test_an_array_that_is_no_image_is_refused(message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        read_image(WRONG_ARRAYS[message])


def test_a_jpeg_of_a_thousand_scans_is_refused_undecoded(monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(noise(24, 32, 3)).save(stream := io.BytesIO(), "JPEG", progressive=True)
    content = bytearray(stream.getvalue())
    assert read_image(bytes(content)).image.size == (32, 24)
    frame, scan = content.index(b"\xff\xc2"), content.rindex(b"\xff\xda")
    content[frame + 5 : frame + 9] = struct.pack(">HH", 9000, 10_000)
    content[scan:-2] *= 1000
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(InputError, match=r"is a JPEG of 10\d\d scans; save it again as baseline"):
        read_image(bytes(content))


def test_levels_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="holds levels that are not finite numbers"):
        read_image(tiff(np.array([0, np.nan, 1], "<f4"), 32, 3))


@pytest.mark.parametrize(
    "name", ["../x.png", "/etc/x.png", "a/../../x.png", "C:\\x.png", "a\0b", "\n", "", 7]
)
def test_a_name_may_not_leave_its_folder(name: object, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="want the name of a file inside the image folder"):
        image_in(tmp_path, name)
    assert image_in(tmp_path, "sub/x..y.png") == tmp_path / "sub" / "x..y.png"


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
        read_image(path)


BAD_FILES = {
    "empty": (b"", "is empty"),
    "text": (b"I am not an image.\n" * 9, "not an image in a format"),
    "header only": (png_header(9, 9)[:20], "read as an image|not an image"),
    "no pixels": (png_header(9, 9), "cannot be read as an image"),
    "a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image in a format"),
    "zip": (b"PK\x03\x04" + bytes(99), "not an image in a format"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_give_one_line(case: str, tmp_path: Path) -> None:
    content, message = BAD_FILES[case]
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_image(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tiff", "webp"])
def test_a_truncated_file_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(noise(90, 90, 3)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=r"cannot be read|not an image"):
        read_image(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, message in [
        ("", "is a folder"),
        ("absent.png", "no image at"),
        ("a\0b", "no image at"),
        ("x" * 999, "cannot be read|no image at"),
        ("pipe", "a device or a pipe"),
    ]:
        with pytest.raises(InputError, match=message):
            read_image(tmp_path / name)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_a_damaged_file_gives_a_image_or_our_error(tmp_path: Path, data: st.DataObject) -> None:
    suffix = data.draw(st.sampled_from(["png", "jpg", "gif", "bmp", "tiff", "webp", "ppm", "ico"]))
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(noise(20, 30, 3)).save(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        assert read_image(path).image.mode == "RGB"
    except InputError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["llava-1.5", "padded"])
def test_an_extreme_shape_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="too long and narrow"):
        to_pixels(Image.new("RGB", (60_000, 1)), image_record(PROCESSORS[name]))


def test_without_resizing_the_size_must_fit() -> None:
    record = replace(PLAIN, resize=None, crop=None, height=8, width=9)
    assert to_pixels(Image.new("RGB", (9, 8)), record).shape == (1, 3, 8, 9)
    with pytest.raises(InputError, match="takes images of 9 x 8"):
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
