"""A video in SmolVLM2: an opening sentence, and before each frame when it is seen."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

from edgeprune.errors import SpecError
from edgeprune.models._checkpoint import Checkpoint
from edgeprune.models._image_record import count, unsupported
from edgeprune.models._video import SETTINGS, sampling_rate, video_settings

ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    "nineteen",
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
MOST = 999
"""Frames of a video, since their number is written in words."""


def in_words(number: int) -> str:
    """A number up to 999 as the sentence writes it, as the package num2words does."""
    hundreds, rest = divmod(number, 100)
    tens, ones = divmod(rest, 10)
    below = ONES[rest] if rest < len(ONES) else f"{TENS[tens - 2]}-{ONES[ones]}"
    if rest >= len(ONES) and not ones:
        below = TENS[tens - 2]
    if not hundreds:
        return below
    return f"{ONES[hundreds]} hundred" + (f" and {below}" if rest else "")


def written_video(frames: int, fps: float, frame: str) -> str:
    """What the processor writes for a video sampled at a rate; `frame` is what it writes for an
    image of one tile."""
    if frames > MOST:
        raise SpecError(f"--frames of a smolvlm are at most {MOST}; got {frames}")
    length = timedelta(seconds=int(frames / fps))
    opening = (
        f"You are provided the following series of {in_words(frames)} frames from a {length}"
        " [H:MM:SS] video.\n"
    )
    seconds = (n / fps for n in range(frames))
    times = (f"{int(s // 60):02d}:{int(s % 60):02d}" for s in seconds)
    return opening + "".join(f"\nFrame from {time}:{frame}" for time in times) + "\n\n"


def video_rate(checkpoint: Checkpoint) -> float:
    """Frames a second at which the checkpoint's video processor samples."""
    sampling = _sampling(checkpoint)
    if "fps" not in sampling:
        return sampling_rate(checkpoint, default=1)
    fps = sampling["fps"]
    if not isinstance(fps, (int, float)) or not 0 < fps < math.inf:
        raise unsupported("video_sampling", sampling, "fps as a positive number")
    return float(fps)


def frame_processor(checkpoint: Checkpoint, tile: int) -> Any:
    """Pillow doing to a frame what the settings of the video processor say: a longest edge, then a
    tile, whatever its shape.

    The video processor resizes with torchvision, which rounds some values otherwise.
    """
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    found = video_settings(checkpoint)
    given = {name: found[name] for name in SETTINGS if found.get(name) is not None}
    edge = dict(_sampling(checkpoint).get("video_size") or found.get("size") or {})
    given["size"] = {"longest_edge": count("video_size", edge.get("longest_edge"))}
    given["max_image_size"] = found.get("max_image_size") or {"longest_edge": tile}
    kept = {name: value for name, value in given.items() if "crop" not in name}
    return SmolVLMImageProcessorPil(**kept, do_image_splitting=False)


def _sampling(checkpoint: Checkpoint) -> dict[str, Any]:
    found = video_settings(checkpoint).get("video_sampling")
    return found if isinstance(found, dict) else {}
