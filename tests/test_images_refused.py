"""Images and image processors that are refused, each in one line."""

from __future__ import annotations

import io
import os
import re
import struct
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
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from edgeprune import images
from edgeprune.errors import InputError, ModelError
from edgeprune.images import image_in, read_image
from edgeprune.runtime.images import to_pixels
from tests.processors import (
    PLAIN,
    PROCESSORS,
    image_record,
    noise,
)

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


@pytest.mark.parametrize(
    "name", ["../x.png", "/etc/x.png", "a/../../x.png", "C:\\x.png", "a\0b", "\n", "", 7]
)
def test_a_name_may_not_leave_its_folder(name: object, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="want the name of a file inside the image folder"):
        image_in(tmp_path, name)
    assert image_in(tmp_path, "sub/x..y.png") == tmp_path / "sub" / "x..y.png"


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
