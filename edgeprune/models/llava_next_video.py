"""LLaVA-NeXT-Video: LLaVA-NeXT for pictures; with --frames a video, 2 x 2 patches a token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgeprune.models import _adapter
from edgeprune.models._anyres import anyres_layout, anyres_tiling
from edgeprune.models._checkpoint import Checkpoint
from edgeprune.models._layout import Layout
from edgeprune.models._media import Asked
from edgeprune.models._text import decoder_config
from edgeprune.models._towers import clip_or_siglip, is_tied, projector, read_config, refuse
from edgeprune.models._video import frame_processor, video
from edgeprune.models._vision import VisionConfig
from edgeprune.tiling import Size


class Adapter(_adapter.Adapter):
    """Frozen for pictures of 2 x 2 tiles unless another size, or a video, is asked for."""

    def __init__(self, checkpoint: Checkpoint, asked: Asked) -> None:
        from transformers import LlavaNextVideoConfig

        asked.allow("llava_next_video", pictures=True, frames=True)
        config = read_config(checkpoint, LlavaNextVideoConfig)
        super().__init__(checkpoint, config, asked)
        encoder = clip_or_siglip(config)
        if asked.frames is None:
            size = asked.size or Size(2 * encoder.image, 2 * encoder.image)
            self.tiling = anyres_tiling(config.image_grid_pinpoints, encoder, size)
            layout = anyres_layout(self.tiling).chained(self.between())
        else:
            self.media = video(config)
            layout = _frames(config, encoder.side, asked.frames)
        self.vision_config = VisionConfig(encoder, projector(config, encoder.features), layout)
        self.decoder_config = decoder_config(config.text_config, is_tied(checkpoint, config))

    def picture_processor(self, own: Callable[[], Any]) -> Any:
        return own() if self.asked.frames is None else frame_processor(self.checkpoint)


def _frames(config: Any, side: int, frames: int) -> Layout:
    """Each frame's patches averaged by squares."""
    mode, stride = config.spatial_pool_mode, config.spatial_pool_stride
    refuse(
        config,
        {
            f"spatial_pool_mode {mode!r}": mode == "average",
            f"spatial_pool_stride {stride} for {side} x {side} patches": side % stride == 0,
        },
    )
    return Layout.plain(side, stride, frames, pool="mean")
