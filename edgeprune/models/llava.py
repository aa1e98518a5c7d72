"""LLaVA 1.5: CLIP or SigLIP vision tower, two-layer projector, LLaMA-like decoder."""

from __future__ import annotations

from edgeprune.models import _adapter
from edgeprune.models._checkpoint import Checkpoint
from edgeprune.models._media import Asked
from edgeprune.models._text import decoder_config
from edgeprune.models._towers import (
    clip_or_siglip,
    is_tied,
    one_size,
    one_tile,
    projector,
    read_config,
)
from edgeprune.models._vision import VisionConfig


class Adapter(_adapter.Adapter):
    def __init__(self, checkpoint: Checkpoint, asked: Asked) -> None:
        from transformers import LlavaConfig

        asked.allow("llava", pictures=True)
        config = read_config(checkpoint, LlavaConfig)
        super().__init__(checkpoint, config, asked)
        encoder = clip_or_siglip(config, cls=True)
        one_size(asked.size, encoder.image)
        layout = one_tile(config, encoder.side).chained(self.between())
        self.vision_config = VisionConfig(encoder, projector(config, encoder.features), layout)
        self.decoder_config = decoder_config(config.text_config, is_tied(checkpoint, config))
