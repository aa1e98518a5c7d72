"""LLaVA-NeXT-Video: LLaVA-NeXT for images; with --frames a video, 2 x 2 patches a token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

from edgeprune.models import _llava
from edgeprune.models._anyres import ONE_RASTER, anyres_layout, anyres_tiling
from edgeprune.models._image_record import Reader, tiled
from edgeprune.models._layout import Layout
from edgeprune.models._media import Media, Takes
from edgeprune.models._towers import refuse
from edgeprune.models._video import FRAME_READERS, frame_processor, video
from edgeprune.tiling import Size, Tiling


class Adapter(_llava.Adapter):
    """Frozen for images of 2 x 2 tiles unless another size, or a video, is asked for."""

    takes: ClassVar[Takes] = Takes(frames=True, all_tiles=ONE_RASTER)

    def config_class(self) -> Any:
        from transformers import LlavaNextVideoConfig

        return LlavaNextVideoConfig

    def read_tiling(self) -> Tiling | None:
        if self.asked.frames is not None:
            return None
        size = self.asked.size or Size(2 * self.encoder.image, 2 * self.encoder.image)
        return anyres_tiling(self.config.image_grid_pinpoints, self.encoder, size)

    def read_media(self) -> Media:
        return super().read_media() if self.tiling else video(self.config)

    def read_layout(self) -> Layout:
        if self.tiling is not None:
            return anyres_layout(self.tiling).chained(self.between)
        return _frames(self.config, self.encoder.side, self.shown)

    def image_readers(self) -> Mapping[str, Reader]:
        if self.tiling is None:
            return FRAME_READERS
        return {"LlavaNextImageProcessor": partial(tiled, tiling=self.tiling)}

    def image_processor(self, own: Callable[[], Any]) -> Any:
        return own() if self.tiling else frame_processor(self.checkpoint)


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
