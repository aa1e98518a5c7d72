"""LLaVA-OneVision: SigLIP vision tower, Qwen2 decoder, tiles as LLaVA-NeXT has them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from edgeprune.errors import SpecError
from edgeprune.models import _adapter
from edgeprune.models._anyres import anyres_layout, anyres_tiling
from edgeprune.models._checkpoint import Checkpoint
from edgeprune.models._encoder import EncoderConfig
from edgeprune.models._layout import NEWLINE, Layout
from edgeprune.models._media import Asked
from edgeprune.models._text import decoder_config
from edgeprune.models._towers import clip_or_siglip, is_tied, one_size, projector, read_config
from edgeprune.models._video import SETTINGS, frame_processor, video
from edgeprune.models._vision import VisionConfig
from edgeprune.tiling import Size, Tiling, shown


class Adapter(_adapter.Adapter):
    """Frozen for pictures of one tile, seen twice, unless another size is asked for."""

    def __init__(self, checkpoint: Checkpoint, asked: Asked) -> None:
        from transformers import LlavaOnevisionConfig

        asked.allow("llava_onevision", pictures=True, frames=True)
        config = read_config(checkpoint, LlavaOnevisionConfig)
        super().__init__(checkpoint, config, asked)
        encoder = clip_or_siglip(config)
        layout = self._layout(encoder)
        self.vision_config = VisionConfig(encoder, projector(config, encoder.features), layout)
        self.decoder_config = decoder_config(config.text_config, is_tied(checkpoint, config))

    def _layout(self, encoder: EncoderConfig) -> Layout:
        """Tiles of one picture; of several pictures or frames no tiles, but a newline at the end of
        each picture, or of the video, whose frames are resized to a quarter of the tokens."""
        if self.asked.frames is not None:
            self.media = video(self.config)
            return _ended(Layout.plain(encoder.side, 2, self.asked.frames, pool="resize"))
        if self.asked.pictures > 1:
            one_size(self.asked.size, encoder.image)
            return _ended(Layout.plain(encoder.side)).chained(self.between())
        size = self.asked.size or Size(encoder.image, encoder.image)
        self.tiling = anyres_tiling(self.config.image_grid_pinpoints, encoder, size)
        _check_shrinking(self.tiling, self.config.vision_aspect_ratio)
        return anyres_layout(self.tiling)

    def picture_processor(self, own: Callable[[], Any]) -> Any:
        if self.asked.frames is not None:
            return frame_processor(self.checkpoint)
        return square_processor(own()) if self.asked.pictures > 1 else own()


def _ended(layout: Layout) -> Layout:
    """A layout with a newline after its last token."""
    order = (*layout.order, NEWLINE)
    return replace(layout, order=order, grid=(1, len(order)), newline=True)


def square_processor(own: Any) -> Any:
    """What the family's image processor does to each of several pictures: padding to a square of
    the mean colour, and resizing."""
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    given = {name: getattr(own, name) for name in SETTINGS}
    return LlavaImageProcessorPil(**{**given, "do_pad": True, "do_center_crop": False})


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
