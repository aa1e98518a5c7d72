"""Video-LLaVA: a video of 8 frames, 256 patches and [CLS] of each; LLaMA decoder; no pictures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from edgeprune.models import _adapter
from edgeprune.models._checkpoint import Checkpoint
from edgeprune.models._layout import Layout
from edgeprune.models._media import Asked
from edgeprune.models._text import decoder_config
from edgeprune.models._towers import clip_or_siglip, is_tied, projector, read_config
from edgeprune.models._video import frame_processor, video
from edgeprune.models._vision import VisionConfig

FRAMES = 8


class Adapter(_adapter.Adapter):
    """transformers reads [CLS] of each frame too: 257 tokens a frame, 2,056 of 8."""

    stem: ClassVar[str] = "video_tower"

    def __init__(self, checkpoint: Checkpoint, asked: Asked) -> None:
        from transformers import VideoLlavaConfig

        asked = replace(asked, frames=asked.frames or FRAMES)
        asked.allow("video_llava", frames=True)
        config = read_config(checkpoint, VideoLlavaConfig)
        super().__init__(checkpoint, config, asked)
        self.media, encoder = video(config), clip_or_siglip(config)
        layout = _layout(encoder.side, self.shown)
        self.vision_config = VisionConfig(encoder, projector(config, encoder.width), layout)
        self.decoder_config = decoder_config(config.text_config, is_tied(checkpoint, config))

    def picture_processor(self, own: Any) -> Any:
        return frame_processor(self.checkpoint)


def _layout(side: int, frames: int) -> Layout:
    """Frame after frame, [CLS] and then row after row."""
    order, size = list[int](), side**2
    for frame in range(frames):
        order += [-1 - frame, *range(frame * size, (frame + 1) * size)]
    return Layout(frames, side, 1, tuple(order), (1, len(order)), cls=True)
