"""Where frames come from: a folder, a video file, a camera or stream, a pipe of raw pixels."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from PIL import Image

from edgeprune import terminal
from edgeprune.errors import InputError, SpecError, brief
from edgeprune.images import ImageSource
from edgeprune.runtime import video

LONGEST_WAIT = 30.0
"""Seconds between two tries to open a stream again; the first is after one."""
STALLED = 10
"""Seconds without a packet after which a stream counts as lost."""
PIXELS = {"rgb": (0, 1, 2), "bgr": (2, 1, 0), "rgbx": (0, 1, 2), "bgrx": (2, 1, 0), "gray": (0,)}
"""Forms of raw pixels: where red, green and blue stand in the bytes of one."""
MOST_PIXELS = 40_000_000
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
"""Ends of names of files that are an image, not a video."""
_URL = re.compile(r"(rtsps?|rtmps?|https?|udp|rtp|srt|tcp)://", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Frame:
    """One image, its number from 0, and its time in seconds."""

    image: ImageSource
    number: int
    seconds: float


class Source(Protocol):
    """What yields frames; a live one does not wait for whoever takes them."""

    @property
    def live(self) -> bool: ...

    def frames(self) -> Iterator[Frame]:
        """Frames as they come. InputError where there are none."""
        ...


@dataclass(frozen=True, slots=True)
class Images:
    """An image file, or the files of a folder by name; one a second as far as time counts."""

    path: Path
    live = False

    def frames(self) -> Iterator[Frame]:
        files = [self.path]
        if self.path.is_dir():
            files = sorted(f for f in self.path.iterdir() if f.is_file() and f.name[0] != ".")
        if not files:
            raise InputError(f"{self.path} holds no files; give a folder of images")
        for number, file in enumerate(files):
            yield Frame(file, number, float(number))


@dataclass(frozen=True, slots=True)
class VideoFile:
    """All frames of a clip, at the times that the clip says."""

    path: Path
    live = False

    def frames(self) -> Iterator[Frame]:
        for number, (image, seconds) in enumerate(video.all_frames(self.path)):
            yield Frame(image.image, number, seconds)


class Stream:
    """A camera or a stream over the network, which is opened again where it ends or fails."""

    live = True

    def __init__(self, name: str, wait: Callable[[float], None] = time.sleep) -> None:
        self.name, self._wait = name, wait

    def frames(self) -> Iterator[Frame]:
        started, number, delay = time.monotonic(), 0, 0.0
        while True:
            try:
                for image in self.images():
                    yield Frame(image, number, time.monotonic() - started)
                    number, delay = number + 1, 0.0
                why = "it ended"
            except InputError as error:
                if not number:  # it never worked: most likely the name is wrong
                    raise
                why = str(error)
            if not number:
                raise InputError(f"{shown(self.name)} gives no frame; check the source")
            delay = min(LONGEST_WAIT, 2 * delay or 1.0)
            terminal.note(f"{shown(self.name)}: {why}; opened again in {delay:g} s")
            self._wait(delay)

    def images(self) -> Iterator[Image.Image]:
        """Frames until the stream ends; InputError where it fails."""
        av = video.pyav()
        device = self.name.startswith("/dev/")
        options = {} if device else {"rtsp_transport": "tcp"}
        try:
            with av.open(
                self.name,
                format="v4l2" if device else None,
                options=options,
                timeout=float(STALLED),
            ) as container:
                stream = container.streams.video[0]
                for frame in container.decode(stream):
                    yield video.frame_image(frame, video.aspect_of(stream)).image
        except (OSError, ValueError, IndexError, av.FFmpegError) as error:
            reason = brief(getattr(error, "strerror", None) or error)
            raise InputError(
                f"{shown(self.name)} cannot be read ({reason}); check the source"
            ) from error


class RawPipe:
    """Raw pixels from a pipe, frame after frame of one size, without heads between them."""

    live = True

    def __init__(self, pipe: BinaryIO, size: tuple[int, int], pixels: str) -> None:
        """`pipe` is not buffered; `size` is width, height; `pixels` one of PIXELS."""
        self._pipe, (self._width, self._height) = pipe, size
        self._order, self._depth = PIXELS[pixels], {"gray": 1, "rgb": 3, "bgr": 3}.get(pixels, 4)

    def frames(self) -> Iterator[Frame]:
        started, number, rest = time.monotonic(), 0, b""
        length = self._width * self._height * self._depth
        while True:
            content = bytearray(rest)
            while len(content) < length:
                if not (part := self._pipe.read(length - len(content))):
                    break
                content += part
            if len(content) < length:
                if number == 0 or content:
                    raise InputError(
                        f"the pipe ended inside frame {number}: {len(content)} bytes of {length};"
                        " check --size and --pixels"
                    )
                return
            levels = np.frombuffer(bytes(content), np.uint8)
            levels = levels.reshape(self._height, self._width, self._depth)
            image = levels[..., self._order] if len(self._order) > 1 else levels[..., 0]
            yield Frame(np.ascontiguousarray(image), number, time.monotonic() - started)
            number += 1


def find(name: str, size: tuple[int, int] | None, pixels: str, pipe: BinaryIO) -> Source:
    """The source of a name: `-`, an address, a device, a folder, a file."""
    if name == "-":
        if size is None:
            raise SpecError("frames of a pipe have a size; say it: --size 640x360")
        if size[0] * size[1] > MOST_PIXELS:
            raise SpecError(f"--size is at most {MOST_PIXELS:,} pixels")
        return RawPipe(pipe, size, pixels)
    if size is not None:
        raise SpecError("--size is of frames from a pipe (SOURCE -); leave it out")
    path = Path(name)
    if _URL.match(name) or path.is_char_device():
        return Stream(name)
    if path.is_dir() or path.suffix.lower() in IMAGES:
        return Images(path)
    if path.is_file():
        return VideoFile(path)
    raise InputError(
        f"there is nothing at {shown(name)}; give a camera (/dev/video0), an RTSP address, a video"
        " file, a folder of images, or - for raw frames on stdin"
    )


def shown(name: str) -> str:
    """A source as it may be told: without a password."""
    return re.sub(r"//[^/]*@", "//", name)
