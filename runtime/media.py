"""What a prompt shows: one picture, several, or a video's frames, as the bundle was frozen for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from edgeprune.bundle import ImageRecord
from edgeprune.errors import InputError
from edgeprune.runtime.images import load_image, remarks, to_pixels
from edgeprune.runtime.video import read_frames

Picture = Path | str | Image
Shown = Picture | Sequence[Picture]
"""A picture, several, or for a video its file, or its frames one by one."""


def load(shown: Shown, record: ImageRecord) -> list[Image]:
    """The pictures or frames, as many as the bundle takes; InputError where there are others."""
    if record.frames is not None and isinstance(shown, (str, Path)):
        return read_frames(shown, record.frames)
    several = shown if isinstance(shown, Sequence) and not isinstance(shown, str) else [shown]
    wanted, found = record.frames or record.pictures, len(several)
    if found != wanted:
        what, option = ("frames", "--frames") if record.frames else ("pictures", "--pictures")
        raise InputError(
            f"this bundle takes {wanted} {what if wanted > 1 else what[:-1]}, got {found}; give as"
            f" many, or export with {option} {found}"
        )
    return [load_image(one) if isinstance(one, (str, Path)) else one for one in several]


def pixels(images: Sequence[Image], record: ImageRecord) -> NDArray[np.float32]:
    """All of them as the vision graph takes them, float32 of the record's shape."""
    return np.concatenate([to_pixels(image, record) for image in images])


def all_remarks(images: Sequence[Image], record: ImageRecord) -> tuple[str, ...]:
    """What a user should know of how they are taken, each remark once."""
    return tuple(dict.fromkeys(r for image in images for r in remarks(image, record)))
