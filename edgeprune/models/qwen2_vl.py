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
        return TowerConfig(
            blocks=vision.depth,
            width=vision.embed_dim,
            mlp_width=int(vision.embed_dim * vision.mlp_ratio),
            heads=vision.num_heads,
            patch=vision.patch_size,
            frames=vision.temporal_patch_size,
            rows=rows,
            columns=columns,
            activation=vision.hidden_act,
            theta=vision.rope_parameters["rope_theta"],
        )
