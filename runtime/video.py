"""A video file -> the frames that a bundle was frozen for, spread evenly over the clip.

Frames are what a player would show: turned as the clip's display matrix says, and stretched where
its pixels are not square. The file is all that is read: playlists and every other format that names
further files or addresses are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from edgeprune.errors import BackendError, InputError, brief
from edgeprune.images import RgbImage, check_file
from edgeprune.install_hints import install
from edgeprune.rgb import TURNS

FORMATS = (
    "mov mp4 m4v matroska webm avi mpeg mpegts mpegvideo m4v h264 hevc ivf obu ogg flv asf gif"
)
"""Containers of FFmpeg's that hold a clip whole."""
MAX_FRAME_PIXELS = 40_000_000
"""More than 8K. A decoder holds up to 16 frames and more."""
MAX_CLIP_PIXELS = 100_000_000_000
"""Decoded of one clip: an hour of 1280 x 720 at 30 frames a second."""
LEAST_FRAME = 100_000
"""Pixels that a smaller frame counts as, since each costs time."""

T = TypeVar("T")


def read_frames(path: Path | str, count: int, take: Callable[[RgbImage], T]) -> list[T]:
    """What `take` makes of each of `count` frames, one after the other.

    Frame i of n is number floor(i * total / n), as transformers' video processors sample.
    InputError where there are fewer frames, or where the file is no video.
    """
    path = Path(path)
    check_file(path, "video")
    av = pyav()
    with _readable(path):
        total = _declared(av, path)
        frames = _spread(av, path, total, count, take)
        if len(frames) < count:  # what a file says of itself may be wrong, or nothing
            total = sum(1 for _ in _decoded(av, path))
            frames = _spread(av, path, total, count, take)
    if len(frames) == count:
        return frames
    raise InputError(
        f"{path} has {total} frames, this bundle takes {count}; give a longer video, or export with"
        " fewer --frames"
    )


def all_frames(path: Path | str) -> Iterator[tuple[RgbImage, float]]:
    """Every frame of a clip and its time in seconds; InputError where the file is no video."""
    path = Path(path)
    check_file(path, "video")
    av = pyav()
    with _readable(path):
        for number, (frame, aspect) in enumerate(_decoded(av, path)):
            yield frame_image(frame, aspect), float(number if frame.time is None else frame.time)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Whatever goes wrong inside is an InputError."""
    try:
        yield
    except (InputError, BackendError):
        raise
    except Exception as error:  # PyAV raises more than its own errors on a damaged file
        reason = brief(getattr(error, "strerror", None) or error)
        raise InputError(
            f"{path} cannot be read as a video ({reason}): it is damaged, in a format that is not"
            f" read, or its frames have more than {MAX_FRAME_PIXELS:,} pixels; convert it to an MP4"
        ) from error


@contextmanager
def _opened(av: Any, path: Path) -> Iterator[Any]:
    """The container. It reads a stream of ours, so that FFmpeg itself opens nothing."""
    options = {
        "format_whitelist": FORMATS.replace(" ", ","),
        "protocol_whitelist": "none",
        "max_pixels": str(MAX_FRAME_PIXELS),
    }
    with (
        path.open("rb") as stream,
        av.open(stream, options=options, metadata_errors="replace") as container,
    ):
        if not container.streams.video:
            raise InputError(f"{path} holds no video; give a clip")
        yield container


def _declared(av: Any, path: Path) -> int:
    """Frames of the first video stream as the file says it; 0 where it does not."""
    with _opened(av, path) as container:
        said: int = container.streams.video[0].frames
    return said


def _spread(av: Any, path: Path, total: int, count: int, take: Callable[[RgbImage], T]) -> list[T]:
    """`count` frames of `total`; fewer where there are not so many."""
    if total < count:
        return []
    wanted = [i * total // count for i in range(count)]
    return [take(frame_image(frame, aspect)) for frame, aspect in _until(av, path, wanted)]


def _decoded(av: Any, path: Path) -> Iterator[tuple[Any, Fraction]]:
    """Frames, and how many times wider than high their pixels are; InputError for too much."""
    left = MAX_CLIP_PIXELS
    with _opened(av, path) as container:
        stream = container.streams.video[0]
        stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
        for frame in container.decode(stream):
            left -= max(LEAST_FRAME, frame.width * frame.height)
            if left < 0:
                raise InputError(
                    f"{path} has more than {MAX_CLIP_PIXELS:,} pixels in all its frames; cut it to"
                    " the part to ask about, or scale it down"
                )
            yield frame, aspect_of(stream)


def aspect_of(stream: Any) -> Fraction:
    """How many times wider than high the pixels of a stream are; 1 where it does not say."""
    aspect: Fraction | None = stream.sample_aspect_ratio
    return aspect if aspect and aspect > 0 else Fraction(1)


def _until(av: Any, path: Path, wanted: list[int]) -> Iterator[tuple[Any, Fraction]]:
    """The wanted frames, by number; nothing after the last is decoded."""
    for number, found in zip(range(wanted[-1] + 1), _decoded(av, path), strict=False):
        if number in wanted:
            yield found


def frame_image(frame: Any, aspect: Fraction) -> RgbImage:
    """A frame of PyAV's as a player shows it: square pixels, then turned."""
    image: Image.Image = frame.to_image().convert("RGB")
    warnings = []
    if aspect != 1:
        width, height = _square(image.size, aspect)
        warnings.append(
            f"the clip's pixels are {aspect.numerator}:{aspect.denominator}: its frames are"
            f" stretched from {image.width} x {image.height} to {width} x {height}"
        )
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    turn = _turn(frame)
    if turn is not None:
        warnings.append(f"the clip is {TURNS[turn]}, as its display matrix says")
        image = image.transpose(turn)
    return RgbImage(image, tuple(warnings))


def _square(size: tuple[int, int], aspect: Fraction) -> tuple[int, int]:
    """(width, height) in square pixels; the shorter side of a pixel is the one that grows."""
    width, height = size
    if aspect > 1:
        width = round(width * aspect)
    else:
        height = round(height / aspect)
    if width * height > MAX_FRAME_PIXELS:
        raise InputError(
            f"the clip's pixels are {aspect.numerator}:{aspect.denominator}: its frames would be"
            f" {width:,} x {height:,}; convert it to square pixels"
        )
    return width, height


_TURNS = {
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
}
"""By a, b, c, d of a display matrix: x' = a x + c y and y' = b x + d y, y downwards."""


def _turn(frame: Any) -> Image.Transpose | None:
    """What makes a frame upright; a matrix that is no quarter turn counts as the nearest."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            rows = np.frombuffer(bytes(data), np.int32).reshape(3, 3)[:2, :2].astype(float)
            straight = abs(rows[0, 0] * rows[1, 1]) >= abs(rows[0, 1] * rows[1, 0])
            kept = rows * (np.eye(2) if straight else 1 - np.eye(2))
            a, b, c, d = np.sign(kept).astype(int).ravel().tolist()
            return _TURNS.get((a, b, c, d))
    return None


def pyav() -> Any:
    """The package; BackendError where it is missing."""
    try:
        import av
    except ImportError as error:
        raise BackendError(f"videos are read by PyAV; {install('video')}") from error
    return av
