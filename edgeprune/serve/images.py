"""The images of a request: the bytes behind a data URI, a file of the media folder, an address.

What the bytes hold is looked at by `edgeprune/images.py`, as for every image.
"""

from __future__ import annotations

import base64
import binascii
import os
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from edgeprune.serve.errors import HttpError, refused
from edgeprune.serve.fetching import PARAM, Fetcher, Fetching

_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)
_FILE = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


@dataclass(frozen=True, slots=True)
class ImageDoors:
    """Where images of requests may come from."""

    limit: int  # bytes of one
    media: Path | None = None  # folder that `file:` may read from
    fetcher: Fetcher | None = None  # None: no addresses

    def open(self) -> ImageReader:
        """For one request."""
        return ImageReader(self, None if self.fetcher is None else self.fetcher.begin())


@dataclass(frozen=True, slots=True)
class ImageReader:
    """Reads the images of one request."""

    doors: ImageDoors
    fetching: Fetching | None

    def read(self, url: str) -> bytes:
        """The bytes of an image; HttpError where the address is of a kind that is not served."""
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            return _decoded(url)
        if scheme == "file":
            return _read(url, self.doors.media, self.doors.limit)
        if scheme in ("http", "https"):
            if self.fetching is None:
                raise refused(
                    "this server fetches no images from addresses (--allow-urls); send the image as"
                    " a data URI (data:image/png;base64,...)",
                    PARAM,
                )
            return self.fetching.get(url, self.doors.limit)
        raise refused(
            "an image is a data URI (data:image/png;base64,...), with --media a file (file:NAME),"
            f" or with --allow-urls an https address; got {url[:20]!r}",
            PARAM,
        )


def _decoded(url: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise refused("a data URI of an image is data:image/png;base64, and the bytes", PARAM)
    try:
        return base64.b64decode(unquote(data) if "%" in data else data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise refused(f"the data URI of an image is no base64 ({error})", PARAM) from error


def _read(url: str, media: Path | None, limit: int) -> bytes:
    """A file below the media folder. Each folder on the way is opened in the one before, and no
    link is followed, so that nothing outside can be reached, whoever changes links meanwhile."""
    if media is None:
        raise refused("this server reads no files; it is started with --media DIR to do so", PARAM)
    name = unquote(url[len("file:") :])
    name = name[2:] if name.startswith("//") else name
    path = PurePosixPath(name)
    if path.is_absolute() and path.is_relative_to(media.as_posix()):
        path = path.relative_to(media.as_posix())
    parts = path.parts
    if not parts or path.is_absolute() or ".." in parts or "\0" in name:
        raise refused("a file is named by its path below the media folder, without ..", PARAM)
    missing = HttpError(404, f"there is no file {str(path)!r} in the media folder", PARAM)
    if not os.supports_dir_fd or os.open not in os.supports_dir_fd:
        raise refused("this system cannot open files below a folder safely; send a data URI", PARAM)
    opened = [os.open(media, os.O_RDONLY)]
    try:
        for part in parts[:-1]:
            opened.append(os.open(part, _FOLDER, dir_fd=opened[-1]))
        opened.append(os.open(parts[-1], _FILE, dir_fd=opened[-1]))
        status = os.fstat(opened[-1])
        if not stat.S_ISREG(status.st_mode):
            raise missing
        if status.st_size > limit:
            raise HttpError(413, f"a file may have {limit} bytes, it has {status.st_size}", PARAM)
        with os.fdopen(os.dup(opened[-1]), "rb") as file:
            return file.read(limit)
    except (OSError, UnicodeError) as error:
        raise missing from error
    finally:
        for number in opened:
            os.close(number)
