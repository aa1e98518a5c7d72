"""LLaVA-NeXT (1.6): LLaVA with tiles, up to 2,880 patches and a newline token for each row."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from edgeprune.models import _llava
from edgeprune.models._anyres import ONE_RASTER, anyres_layout, anyres_tiling
from edgeprune.models._family import Elsewhere
from edgeprune.models._image_record import Reader, tiled
from edgeprune.models._layout import Layout
from edgeprune.models._media import Takes
from edgeprune.models._nearby import Nearby
from edgeprune.tiling import Size, Tiling


class Adapter(_llava.Adapter):
    """Frozen for images of 2 x 2 tiles unless another size is asked for."""

    elsewhere: ClassVar[tuple[Elsewhere, ...]] = (
        Elsewhere("Phi-3-vision and Phi-3.5-vision", "Phi3VForCausalLM", "llava_next"),
    )
    nearby: ClassVar[tuple[Nearby, ...]] = (
        Nearby(
            "Perception LM",
            ("perception_lm",),
            tower="the Perception Encoder, of timm",
            projector="tokens averaged behind it",
        ),
        Nearby(
            "Granite 4 Vision",
            ("granite4_vision",),
            projector="a Q-Former for each window",
            decoder="rows added after layers of its own choice",
        ),
        Nearby(
            "Phi-4-multimodal",
            ("phi4_multimodal",),
            tower="one of its own",
            decoder="a LoRA adapter for images, a part of each head turned (Phi-4)",
        ),
    )
    takes: ClassVar[Takes] = Takes(all_tiles=ONE_RASTER)
    tiling: Tiling

    def config_class(self) -> Any:
        from transformers import LlavaNextConfig

        return LlavaNextConfig

    def read_tiling(self) -> Tiling:
        size = self.asked.size or Size(2 * self.encoder.image, 2 * self.encoder.image)
        return anyres_tiling(self.config.image_grid_pinpoints, self.encoder, size)

    def read_layout(self) -> Layout:
        return anyres_layout(self.tiling).chained(self.between)

    def image_readers(self) -> Mapping[str, Reader]:
        return {"LlavaNextImageProcessor": partial(tiled, tiling=self.tiling)}
