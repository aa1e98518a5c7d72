"""Video-LLaVA: images of 256 patches; with --frames a video, [CLS] of each frame read too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from edgeprune.models import _llava
from edgeprune.models._image_record import Reader
from edgeprune.models._layout import Layout
from edgeprune.models._media import Media, Takes
from edgeprune.models._names import TensorNames
from edgeprune.models._towers import one_size, one_tile
from edgeprune.models._video import FRAME_READERS, clip_processor, frame_processor, video


class Adapter(_llava.Adapter):
    """One tower for images, another for videos: 257 tokens a frame, 2,056 of the usual 8."""

    takes: ClassVar[Takes] = Takes(frames=True)
    reads_cls: ClassVar[bool] = True

    def config_class(self) -> Any:
        from transformers import VideoLlavaConfig

        return VideoLlavaConfig

    def read_media(self) -> Media:
        return super().read_media() if self.asked.frames is None else video(self.config)

    def read_layout(self) -> Layout:
        one_size(self.asked.size, self.encoder.image)
        if self.asked.frames is not None:
            return Layout.with_cls(self.encoder.side, self.asked.frames)
        return one_tile(self.config, self.encoder.side).chained(self.between)

    @property
    def _tower(self) -> str:
        return "image_tower" if self.asked.frames is None else "video_tower"

    def tensor_names(self) -> TensorNames:
        below = f"{self._tower}.vision_model.", f"{self._tower}."
        return TensorNames(
            tower_prefixes=tuple(top + prefix for prefix in below for top in ("", "model."))
        )

    def is_spare(self, name: str) -> bool:
        """The other tower too."""
        return ("_tower." in name and f"{self._tower}." not in name) or super().is_spare(name)

    def image_readers(self) -> Mapping[str, Reader]:
        return FRAME_READERS

    def image_processor(self, own: Callable[[], Any]) -> Any:
        """CLIP's, which does the same as the family's own, an image or a frame at a time."""
        if self.asked.frames is None:
            return clip_processor(own())
        return frame_processor(self.checkpoint)
