"""The one door for images: a file, bytes, an array or a Pillow image becomes upright RGB.

Whatever reads an image goes through `read_image`: the runtime, calibration samples and the
questions of `compare`. It refuses what is no image with one InputError, never waits for a pipe,
and decodes nothing that would fill the device's memory. `edgeprune.rgb` decides how pixels that
are no 8-bit RGB become RGB.
"""

from __future__ import annotations

import io
import logging
import re
import stat
import warnings
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from edgeprune.errors import InputError, brief
from edgeprune.rgb import to_rgb

MAX_PIXELS = 100_000_000
"""A larger image is refused before it is decoded: at 4 bytes a pixel it would fill the device."""
MAX_SCANNED = 4_000_000_000
"""Pixels times scans of a JPEG: 40 scans of the largest image."""
FORMATS = ["PNG", "JPEG", "BMP", "GIF", "PPM", "WEBP", "TIFF", "ICO", "JPEG2000"]
"""Pillow reads more, and for EPS it starts another program."""
if find_spec("PIL.AvifImagePlugin"):  # from Pillow 11.3 on
    FORMATS.append("AVIF")
ANIMATED = ("GIF", "PNG", "TIFF", "WEBP", "AVIF")
"""Formats that hold frames or pages. A phone's JPEG with a preview beside the photo is no such."""

logging.getLogger("PIL").addHandler(logging.NullHandler())  # else what it logs goes to stderr

ImageSource = Path | str | bytes | NDArray[Any] | Image.Image
"""A path, the bytes of a file, an array [height, width] or [height, width, channels], Pillow's."""


@dataclass(frozen=True, slots=True)
class RgbImage:
    """An image as a viewer would show it: mode RGB, upright; and what was done to make it so."""

    image: Image.Image
    warnings: tuple[str, ...] = ()


def read_image(source: ImageSource) -> RgbImage:
    """Read any image as upright RGB; an InputError says what is wrong with anything else.

    Arrays hold grey levels [height, width] or channels [height, width, 1 to 4], red first and
    alpha last, as uint8, uint16 (grey only), bool, or float from 0 to 1.
    """
    name = str(source) if isinstance(source, (str, Path)) else "the image"
    try:
        # Pillow warns of large and of slightly damaged files: we refuse the ones, read the others
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _read(source)
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(
            f"{name} is not an image in a format that is read ({', '.join(FORMATS)}); give a PNG"
            " or JPEG file"
        ) from error
    except Image.DecompressionBombError as error:
        found = next(iter(re.findall(r"\d+", str(error))), "0")  # Pillow says how many first
        raise InputError(_too_large(name, f"{int(found):,}")) from error
    except Exception as error:  # a decoder may raise anything on a damaged file
        reason = brief(error)
        raise InputError(
            f"{name} cannot be read as an image ({reason}): it is damaged, cut short or not yours"
            " to read; copy it again"
        ) from error


def check_file(path: Path, kind: str) -> None:
    """InputError unless there is a file with something in it; `kind` is image or video."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise InputError(f"there is no {kind} at {path}; check the path") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path") from error
    if stat.S_ISDIR(status.st_mode):
        raise InputError(f"{path} is a folder; name one {kind} file in it")
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path} is a device or a pipe; give a file with the {kind}")
    if status.st_size == 0:
        raise InputError(f"{path} is empty (0 bytes); give a file with the {kind}")


def image_in(folder: Path, name: object) -> Path:
    """The path of an image that a samples file names; InputError where it would leave the folder.

    Links within the folder are followed: who made the folder made them.
    """
    text = str(name) if isinstance(name, str) else ""
    parts = {*PurePosixPath(text).parts, *PureWindowsPath(text).parts}
    absolute = PurePosixPath(text).is_absolute() or PureWindowsPath(text).anchor
    control = any(ord(letter) < 32 for letter in text)
    if not text or absolute or control or ".." in parts:
        raise InputError(
            f"the image is named {name!r}; want the name of a file inside the image folder {folder}"
        )
    return folder / text


def _read(source: ImageSource) -> RgbImage:
    if isinstance(source, np.ndarray):
        return _converted("the image", _from_array(source))
    if isinstance(source, Image.Image):
        return _converted("the image", source)
    if isinstance(source, bytes):
        if not source:
            raise InputError("the image is empty (0 bytes); give the bytes of an image file")
        return _opened("the image", io.BytesIO(source))
    check_file(Path(source), "image")
    with Path(source).open("rb") as stream:
        return _opened(str(source), stream)


def _opened(name: str, stream: IO[bytes]) -> RgbImage:
    with Image.open(stream, formats=FORMATS) as image:  # reads the header only
        if image.format in ("JPEG", "MPO"):
            _check_scans(name, stream, image.width * image.height)
        found = _converted(name, image)
        several = False
        if image.format in ANIMATED:
            with suppress(Exception):  # what follows the first frame may be damaged
                several = image.is_animated  # type: ignore[attr-defined]
    if not several:
        return found
    return RgbImage(
        found.image, (*found.warnings, "the image holds several frames; the first one is used")
    )


def _check_scans(name: str, stream: IO[bytes], pixels: int) -> None:
    """A progressive JPEG goes over its pixels in some 10 scans; a thousand would take minutes."""
    at, scans, last = stream.tell(), 0, b""
    stream.seek(0)
    while block := stream.read(1 << 20):
        scans += (last + block).count(b"\xff\xda")
        last = block[-1:]
    stream.seek(at)
    if scans * pixels > MAX_SCANNED:
        raise InputError(f"{name} is a JPEG of {scans} scans; save it again as baseline JPEG")


def _converted(name: str, image: Image.Image) -> RgbImage:
    if image.width * image.height > MAX_PIXELS:
        raise InputError(_too_large(name, f"{image.width:,} x {image.height:,}"))
    if not image.width * image.height:
        raise InputError(f"{name} is {image.width} x {image.height} pixels: there is nothing in it")
    try:
        return RgbImage(*to_rgb(image))
    except InputError as error:
        raise InputError(f"{name} {error}") from error


def _from_array(array: NDArray[Any]) -> Image.Image:
    grey = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1)
    if not grey and (array.ndim != 3 or array.shape[2] not in (2, 3, 4)):
        raise InputError(
            f"an array of shape {list(array.shape)} is no image; want [height, width] or [height,"
            " width, channels] with 1 to 4 channels"
        )
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise InputError(_too_large("the image", f"{array.shape[1]:,} x {array.shape[0]:,}"))
    if array.dtype.kind == "f" and array.size:
        low, high = float(array.min()), float(array.max())
        if not 0 <= low <= high <= 1:  # NaN too
            raise InputError(
                f"levels of a float array run from 0 to 1; got {low:g} to {high:g}; scale it"
            )
        array = np.round(array * 255).astype(np.uint8)
    if array.dtype not in (np.uint8, np.bool_) and not (grey and array.dtype == np.uint16):
        raise InputError(
            f"an array of {array.dtype} is no image; want uint8, uint16 (grey only), bool, or float"
            " from 0 to 1"
        )
    if grey:
        array = array.reshape(array.shape[:2])
    elif array.dtype == np.bool_:
        array = array * np.uint8(255)
    return Image.fromarray(np.ascontiguousarray(array))


def _too_large(name: str, found: str) -> str:
    return f"{name} has {found} pixels, at most {MAX_PIXELS:,} are read; make the image smaller"
