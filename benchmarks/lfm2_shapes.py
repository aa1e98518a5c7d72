"""LFM2-VL in published sizes."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import Lfm2Config, Lfm2VlConfig, Siglip2VisionConfig

from benchmarks.published_shape import IMAGE_TOKEN, Published
from edgeprune.tiling import Size

ATTENTION = 2, 5, 8, 10, 12, 14
"""Indices of the layers that have it, of 16."""


class ImageProcessor:
    """The settings as they are published: all are transformers' defaults."""

    def save_pretrained(self, folder: Path) -> None:
        settings = {"image_processor_type": "Lfm2VlImageProcessorFast"}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def _lfm2_vl(width: int, heads: int, mlp: int, tower: tuple[int, int, int, int]) -> Lfm2VlConfig:
    """`mlp` as the config has it; of the tower blocks, width, MLP and heads."""
    kinds = ["full_attention" if index in ATTENTION else "conv" for index in range(16)]
    blocks, tower_width, tower_mlp, tower_heads = tower
    text = Lfm2Config(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=16,
        num_attention_heads=heads,
        num_key_value_heads=8,
        layer_types=kinds,
    )
    vision = Siglip2VisionConfig(
        hidden_size=tower_width,
        intermediate_size=tower_mlp,
        num_hidden_layers=blocks,
        num_attention_heads=tower_heads,
        vision_use_head=False,
    )
    return Lfm2VlConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_TOKEN,
        projector_hidden_size=2048,
        projector_use_layernorm=False,
    )


BASE, SO400M = (12, 768, 3072, 12), (27, 1152, 4304, 16)
MARKS = "<|image_start|>", "<|image_end|>"
CAMERA = Size(480, 640)
LFM2_SHAPES = {
    "lfm2-vl-450m": Published(
        lambda: _lfm2_vl(1024, 16, 6656, BASE), ImageProcessor, CAMERA, tokens=MARKS
    ),
    "lfm2-vl-1.6b": Published(
        lambda: _lfm2_vl(2048, 32, 12288, SO400M), ImageProcessor, CAMERA, tokens=MARKS
    ),
}
