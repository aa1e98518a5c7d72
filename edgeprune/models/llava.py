"""LLaVA 1.5: CLIP or SigLIP vision tower, two-layer projector, LLaMA-like decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from edgeprune.models import _llava
from edgeprune.models._family import Elsewhere
from edgeprune.models._image_record import Reader, padded, plain
from edgeprune.models._layout import Layout
from edgeprune.models._media import Media, Turns
from edgeprune.models._towers import one_size, one_tile

TURNS = Turns("USER: {image}\n{prompt} ASSISTANT:", "USER: {prompt} ASSISTANT:", "LLaVA-1.5")
"""As the published template writes them; older checkpoints have none."""


class Adapter(_llava.Adapter):
    elsewhere: ClassVar[tuple[Elsewhere, ...]] = (Elsewhere("Moondream 2", "HfMoondream", "llava"),)
    reads_cls: ClassVar[bool] = True

    def config_class(self) -> Any:
        from transformers import LlavaConfig

        return LlavaConfig

    def read_media(self) -> Media:
        return Media.of_images(self.config, self.asked.images, assumed=TURNS)

    def read_layout(self) -> Layout:
        one_size(self.asked.size, self.encoder.image)
        return one_tile(self.config, self.encoder.side).chained(self.between)

    def image_readers(self) -> Mapping[str, Reader]:
        return {
            "CLIPImageProcessor": plain,
            "LlavaImageProcessor": padded,
            "SiglipImageProcessor": plain,
        }
