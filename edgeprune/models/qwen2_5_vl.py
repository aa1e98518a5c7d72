"""Qwen2.5-VL: as Qwen2-VL, with window attention in the vision tower; images or a video."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from edgeprune.models import _qwen
from edgeprune.models._family import Elsewhere
from edgeprune.models._nearby import Nearby
from edgeprune.models._qwen_tower import TowerConfig
from edgeprune.models._towers import refuse

FPS = 2
"""Frames a second that a video is taken to be sampled at, as the model was trained with."""


class Adapter(_qwen.Adapter):
    elsewhere: ClassVar[tuple[Elsewhere, ...]] = (
        Elsewhere("Kimi-VL", "KimiVLForConditionalGeneration", "qwen2_5_vl"),
    )
    nearby: ClassVar[tuple[Nearby, ...]] = (
        Nearby(
            "Qwen2.5-Omni",
            ("qwen2_5_omni",),
            tower="one for sound beside it",
            decoder="a second one that speaks",
        ),
    )
    gated: ClassVar[bool] = True

    def config_class(self) -> Any:
        from transformers import Qwen2_5_VLConfig

        return Qwen2_5_VLConfig

    def times(self, spans: int) -> tuple[int, ...]:
        vision = self.config.vision_config
        interval = vision.tokens_per_second * vision.temporal_patch_size / FPS
        return tuple(int(i * interval) for i in range(spans))

    def tower_config(self, vision: Any, rows: int, columns: int) -> TowerConfig:
        full = tuple(sorted(vision.fullatt_block_indexes))
        somewhere = bool(full) and full[0] >= 0 and full[-1] < vision.depth
        refuse(self.config, {f"full attention in blocks {list(full)} of {vision.depth}": somewhere})
        merge = vision.spatial_merge_size
        return replace(
            _qwen.tower(vision, rows, columns, vision.hidden_size, vision.intermediate_size),
            gated=True,
            window=vision.window_size // merge // vision.patch_size * merge,
            full=full,
        )
