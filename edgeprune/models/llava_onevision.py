"""LLaVA-OneVision: SigLIP vision tower, Qwen2 decoder, tiles as LLaVA-NeXT has them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from edgeprune.errors import SpecError
from edgeprune.models import _llava
from edgeprune.models._anyres import ONE_RASTER, anyres_layout, anyres_tiling
from edgeprune.models._family import Elsewhere
from edgeprune.models._image_record import Reader, padded, tiled
from edgeprune.models._layout import NEWLINE, Layout
from edgeprune.models._media import Media, Takes
from edgeprune.models._nearby import Nearby
from edgeprune.models._towers import one_size
from edgeprune.models._video import FRAME_READERS, SETTINGS, frame_processor, video
from edgeprune.tiling import Size, Tiling, shown


class Adapter(_llava.Adapter):
    """Frozen for images of one tile, seen twice, unless another size is asked for.

    Several images in a prompt are not cut into tiles.
    """

    nearby: ClassVar[tuple[Nearby, ...]] = (
        Nearby(
            "FastVLM as transformers has it",
            ("fast_vlm",),
            tower="FastViT, of convolutions: it gives few tokens, so there is little to prune",
        ),
        Nearby(
            "Molmo2",
            ("molmo2",),
            tower="one of its own",
            projector="attention that pools patches",
            decoder="Molmo's",
        ),
    )
    elsewhere: ClassVar[tuple[Elsewhere, ...]] = (
        Elsewhere("FastVLM as Apple publishes it", "LlavaQwen2ForCausalLM", "llava_onevision"),
        Elsewhere("MiniCPM-V up to 4.5", "MiniCPMV", "llava_onevision"),
        Elsewhere("MiniCPM-o up to 4.5", "MiniCPMO", "llava_onevision"),
    )
    takes: ClassVar[Takes] = Takes(frames=True, all_tiles=ONE_RASTER)

    def config_class(self) -> Any:
        from transformers import LlavaOnevisionConfig

        return LlavaOnevisionConfig

    def read_tiling(self) -> Tiling | None:
        side = self.encoder.image
        if self.asked.frames is not None:
            return None
        if self.asked.images > 1:
            one_size(self.asked.size, side)
            return None
        size = self.asked.size or Size(side, side)
        tiling = anyres_tiling(self.config.image_grid_pinpoints, self.encoder, size)
        _check_shrinking(tiling, self.config.vision_aspect_ratio)
        return tiling

    def read_media(self) -> Media:
        return super().read_media() if self.asked.frames is None else video(self.config)

    def read_layout(self) -> Layout:
        """Of several images or frames no tiles, but a newline at the end of each image, or of the
        video, whose frames are resized to a quarter of the tokens."""
        if self.tiling is not None:
            return anyres_layout(self.tiling)
        if self.asked.frames is not None:
            return _ended(Layout.plain(self.encoder.side, 2, self.asked.frames, pool="resize"))
        return _ended(Layout.plain(self.encoder.side)).chained(self.between)

    def image_readers(self) -> Mapping[str, Reader]:
        if self.asked.frames is not None:
            return FRAME_READERS
        if self.tiling is None:
            return {"LlavaImageProcessor": padded}  # see square_processor
        return {"LlavaOnevisionImageProcessor": partial(tiled, tiling=self.tiling)}

    def image_processor(self, own: Callable[[], Any]) -> Any:
        if self.asked.frames is not None:
            return frame_processor(self.checkpoint)
        return own() if self.tiling else square_processor(own())


def _ended(layout: Layout) -> Layout:
    """A layout with a newline after its last token."""
    order = (*layout.order, NEWLINE)
    return replace(layout, order=order, grid=(1, len(order)), newline=True)


def square_processor(own: Any) -> Any:
    """What the family's image processor does to each of several images: padding to a square of
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
