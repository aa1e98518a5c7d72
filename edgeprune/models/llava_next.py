"""LLaVA-NeXT (1.6): LLaVA with tiles, up to 2,880 patches and a newline token for each row."""

from __future__ import annotations

from edgeprune.models import _adapter
from edgeprune.models._anyres import anyres_layout, anyres_tiling
from edgeprune.models._checkpoint import Checkpoint
from edgeprune.models._media import Asked
from edgeprune.models._text import decoder_config
from edgeprune.models._towers import clip_or_siglip, is_tied, projector, read_config
from edgeprune.models._vision import VisionConfig
from edgeprune.tiling import Size


class Adapter(_adapter.Adapter):
    """Frozen for pictures of 2 x 2 tiles unless another size is asked for."""

    def __init__(self, checkpoint: Checkpoint, asked: Asked) -> None:
        from transformers import LlavaNextConfig

        asked.allow("llava_next", pictures=True)
        config = read_config(checkpoint, LlavaNextConfig)
        super().__init__(checkpoint, config, asked)
        encoder = clip_or_siglip(config)
        size = asked.size or Size(2 * encoder.image, 2 * encoder.image)
        self.tiling = anyres_tiling(config.image_grid_pinpoints, encoder, size)
        layout = anyres_layout(self.tiling).chained(self.between())
        self.vision_config = VisionConfig(encoder, projector(config, encoder.features), layout)
        self.decoder_config = decoder_config(config.text_config, is_tied(checkpoint, config))
