"""A video file -> the frames that a bundle was frozen for, spread evenly over the clip."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from edgeprune.errors import BackendError, InputError
from edgeprune.hints import install
from edgeprune.runtime.images import MAX_PIXELS, check_file


def read_frames(path: Path | str, count: int) -> list[Image.Image]:
    """`count` frames as RGB; InputError where there are fewer, or where it is no video.

    Frame i of n is number floor(i * total / n), as transformers' video processors sample.
    """
    path = Path(path)
    check_file(path, "video")
    av = _import()
    try:
        total = _said(av, path)
        frames = _spread(av, path, total, count)
        if len(frames) < count:  # what a file says of itself may be wrong, or nothing
            total = sum(1 for _ in _decoded(av, path))
            frames = _spread(av, path, total, count)
        if len(frames) == count:
            return frames
    except av.FFmpegError as error:
        raise InputError(f"{path} cannot be read as a video ({error}); copy it again") from error
    raise InputError(
        f"{path} has {total} frames, this bundle takes {count}; give a longer video, or export with"
        " fewer --frames"
    )


def _said(av: Any, path: Path) -> int:
    """Frames of the first video stream as the file says it; 0 where it does not."""
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise InputError(f"{path} holds no video; give a clip")
        said: int = container.streams.video[0].frames
    return said


def _spread(av: Any, path: Path, total: int, count: int) -> list[Image.Image]:
    """`count` frames of `total`; fewer where there are not so many."""
    if total < count:
        return []
    wanted = [i * total // count for i in range(count)]
    return [_picture(path, frame) for frame in _until(av, path, wanted)]


def _decoded(av: Any, path: Path) -> Iterator[Any]:
    with av.open(str(path)) as container:
        yield from container.decode(video=0)


def _until(av: Any, path: Path, wanted: list[int]) -> Iterator[Any]:
    """The wanted frames, by number; nothing after the last is decoded."""
    for number, frame in zip(range(wanted[-1] + 1), _decoded(av, path), strict=False):
        if number in wanted:
            yield frame


def _picture(path: Path, frame: Any) -> Image.Image:
    if frame.width * frame.height > MAX_PIXELS:
        raise InputError(f"frames of {path} have more than {MAX_PIXELS:,} pixels; scale it down")
    picture: Image.Image = frame.to_image()
    return picture.convert("RGB")


def _import() -> Any:
    try:
        import av
    except ImportError as error:
        raise BackendError(f"videos are read by PyAV; {install('video')}") from error
    return av
