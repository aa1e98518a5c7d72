"""Image processors for checkpoints that have none: an image is stretched to the tower's square."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Normalisation = Mapping[str, Sequence[float]]

CLIP: Normalisation = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
IMAGENET: Normalisation = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def square_processor(side: int, normalisation: Normalisation) -> Any:
    """A processor that resizes an image to `side` x `side` pixels, bicubically."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = {"height": side, "width": side}
    return CLIPImageProcessorPil(size=size, do_center_crop=False, resample=3, **normalisation)
