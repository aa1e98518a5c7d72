"""Qwen2-VL: images or a video of any size, frozen to one; its own vision tower, M-RoPE."""

from __future__ import annotations

from typing import Any, ClassVar

from edgeprune.models import _qwen
from edgeprune.models._qwen_tower import TowerConfig


class Adapter(_qwen.Adapter):
    gated: ClassVar[bool] = False

    def config_class(self) -> Any:
        from transformers import Qwen2VLConfig

        return Qwen2VLConfig

    def tower_config(self, vision: Any, rows: int, columns: int) -> TowerConfig:
        width = vision.embed_dim
        return _qwen.tower(vision, rows, columns, width, int(width * vision.mlp_ratio))
