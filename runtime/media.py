"""What a prompt shows: one image, several, or a video's frames, as the bundle was frozen for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import InputError
from edgeprune.images import ImageSource, RgbImage, read_image
from edgeprune.manifest import ImageRecord
from edgeprune.runtime.images import to_pixels, warnings
from edgeprune.runtime.video import read_frames

Shown = ImageSource | Sequence[ImageSource]
"""An image, several, or for a video its file, or its frames one by one."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Pixels as the vision graph takes them, float32 of the record's shape; what was done."""

    pixels: NDArray[np.float32]
    warnings: tuple[str, ...]


def prepare(shown: Shown, record: ImageRecord) -> Prepared:
    """Read what is shown, one image or frame at a time: together they may not fit into memory.

    InputError where there are not as many as the bundle takes, or where one cannot be read.
    """
    if record.frames is not None and isinstance(shown, (str, Path)):
        return _joined(read_frames(shown, record.frames, lambda frame: _one(frame, record)))
    single = isinstance(shown, (str, bytes)) or not isinstance(shown, Sequence)
    several = cast(Sequence[Any], [shown] if single else shown)
    check_count(len(several), record)
    return _joined([_one(read_image(source), record) for source in several])


def check_count(found: int, record: ImageRecord) -> None:
    """InputError unless there are as many images or frames as a bundle takes."""
    wanted = record.frames or record.images
    if found != wanted:
        what, option = ("frames", "--frames") if record.frames else ("images", "--num-images")
        other = f", or export with {option} {found}" if found else ""
        raise InputError(
            f"this bundle takes {wanted} {what if wanted > 1 else what[:-1]}, got {found}; give as"
            f" many{other}"
        )


def _one(read: RgbImage, record: ImageRecord) -> Prepared:
    found = *read.warnings, *warnings(read.image, record)
    return Prepared(to_pixels(read.image, record), found)


def _joined(parts: Sequence[Prepared]) -> Prepared:
    pixels = np.concatenate([part.pixels for part in parts])
    return Prepared(pixels, tuple(dict.fromkeys(r for part in parts for r in part.warnings)))
