"""What families that take a video share."""

from __future__ import annotations

import math
from typing import Any

from edgeprune.models._checkpoint import Checkpoint
from edgeprune.models._image_record import Reader, plain, unsupported
from edgeprune.models._media import Media
from edgeprune.models._stored import read_json

SETTINGS = (
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)


FRAME_READERS: dict[str, Reader] = {"CLIPImageProcessor": plain}
"""Of the image processors that the functions below give."""


def video(config: Any) -> Media:
    """One video in a prompt, its frames one run of visual tokens."""
    token = int(config.video_token_id)
    return Media(token, token, "video")


def sampling_rate(checkpoint: Checkpoint, default: float) -> float:
    """Frames a second at which a checkpoint's video processor samples a video."""
    found = video_settings(checkpoint).get("fps", default)
    if not isinstance(found, (int, float)) or not 0 < found < math.inf:
        raise unsupported("fps", found, "a positive number")
    return float(found)


def timed_at(fps: float) -> str:
    """The note of a family whose prompts say when each frame of a video was seen."""
    return (
        f"the prompt says when each frame is seen: a video is taken to be sampled at {fps:g} frames"
        " a second, whatever is shown"
    )


def frame_processor(checkpoint: Checkpoint) -> Any:
    """Pillow doing to a frame what the settings of the checkpoint's video processor say.

    transformers' video processors resize with torchvision, which rounds some values otherwise.
    """
    found = video_settings(checkpoint)
    given = {name: found[name] for name in SETTINGS if found.get(name) is not None}
    return _clip({"do_center_crop": False, **given})


def clip_processor(own: Any) -> Any:
    """Pillow doing to an image what the settings of an image processor of CLIP's kind say."""
    return _clip({name: getattr(own, name) for name in SETTINGS})


def _clip(settings: dict[str, Any]) -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(**settings)


def video_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Of the video processor, or where a checkpoint has none of the image processor."""
    folder = checkpoint.folder
    for name, key in (
        ("processor_config.json", "video_processor"),  # first, as in transformers
        ("video_preprocessor_config.json", ""),
        ("preprocessor_config.json", ""),
        ("processor_config.json", "image_processor"),
    ):
        if (folder / name).is_file():
            found = read_json(folder / name)
            inner = found.get(key, {}) if key else found
            if inner:
                return dict(inner)
    return {}
