"""Video-LLaVA: pictures of 256 patches; with --frames a video, [CLS] of each frame read too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgeprune.models import _adapter
from edgeprune.models._checkpoint import Checkpoint
from edgeprune.models._layout import Layout
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
from edgeprune.models._video import clip_processor, frame_processor, video
from edgeprune.models._vision import VisionConfig


class Adapter(_adapter.Adapter):
    """One tower for pictures, another for videos: 257 tokens a frame, 2,056 of the usual 8."""

    def __init__(self, checkpoint: Checkpoint, asked: Asked) -> None:
        from transformers import VideoLlavaConfig

        asked.allow("video_llava", pictures=True, frames=True)
        config = read_config(checkpoint, VideoLlavaConfig)
        super().__init__(checkpoint, config, asked)
        encoder = clip_or_siglip(config, cls=True)
        one_size(asked.size, encoder.image)
        if asked.frames is None:
            self.stem = "image_tower"
            layout = one_tile(config, encoder.side).chained(self.between())
        else:
            self.stem, self.media = "video_tower", video(config)
            layout = Layout.with_cls(encoder.side, asked.frames)
        self.vision_config = VisionConfig(encoder, projector(config, encoder.features), layout)
        self.decoder_config = decoder_config(config.text_config, is_tied(checkpoint, config))

    def is_spare(self, name: str) -> bool:
        """The other tower too."""
        return ("_tower." in name and f"{self.stem}." not in name) or super().is_spare(name)

    def picture_processor(self, own: Callable[[], Any]) -> Any:
        """CLIP's, which does the same as the family's own, a picture or a frame at a time."""
        return (
            clip_processor(own()) if self.asked.frames is None else frame_processor(self.checkpoint)
        )
