"""LLaVA-OneVision: SigLIP vision tower, Qwen2 decoder, tiles as LLaVA-NeXT has them."""

from __future__ import annotations

import math

from edgeprune.errors import SpecError
from edgeprune.models import _adapter
from edgeprune.models._anyres import anyres_layout, anyres_tiling
from edgeprune.models._checkpoint import Checkpoint
from edgeprune.models._text import decoder_config
from edgeprune.models._towers import clip_or_siglip, is_tied, projector, read_config
from edgeprune.models._vision import VisionConfig
from edgeprune.tiling import Size, Tiling, shown


class Adapter(_adapter.Adapter):
    """Frozen for pictures of one tile, seen twice, unless another size is asked for."""

    def __init__(self, checkpoint: Checkpoint, size: Size | None = None) -> None:
        from transformers import LlavaOnevisionConfig

        config = read_config(checkpoint, LlavaOnevisionConfig)
        super().__init__(checkpoint, config)
        encoder = clip_or_siglip(config)
        size = size or Size(encoder.image, encoder.image)
        self.tiling = anyres_tiling(config.image_grid_pinpoints, encoder, size)
        _check_shrinking(self.tiling, config.vision_aspect_ratio)
        layout = anyres_layout(self.tiling)
        self.vision_config = VisionConfig(encoder, projector(config, encoder.width), layout)
        self.decoder_config = decoder_config(config.text_config, is_tied(checkpoint, config))


def _check_shrinking(tiling: Tiling, setting: str) -> None:
    """SpecError where the model would shrink the raster after the projector (`anyres_max_9`)."""
    most = int(setting.removeprefix("anyres_max_"))
    _, _, height, width = shown(tiling.grid, Size(tiling.height, tiling.width))
    if math.sqrt(height * width / (most * tiling.tokens**2)) > 1.1:
        raise SpecError(
            f"--image-size {tiling.width}x{tiling.height} makes {height * width} tokens of tiles,"
            f" which this model shrinks to those of {most} tiles: not supported; choose a smaller"
            " --image-size"
        )
