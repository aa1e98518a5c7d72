"""Tiny random checkpoints of LFM2-VL, and what transformers' image processor does: itself it needs
torchvision."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    Lfm2Config,
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    Siglip2VisionConfig,
)

from edgeprune.tiling import Size
from tests.families import TEXT, Family, settled

PUBLISHED = tuple(
    "full_attention" if index in (2, 5, 8, 10, 12, 14) else "conv" for index in range(16)
)
"""Layers of the 450M and the 1.6B."""


class Oracle:
    """One view of each image: `_preprocess` of the processor in transformers, splitting off."""

    patch, factor, least, most = 8, 2, 4, 24

    def save_pretrained(self, folder: Path) -> None:
        settings = {
            "image_processor_type": "Lfm2VlImageProcessorFast",
            "encoder_patch_size": self.patch,
            "downsample_factor": self.factor,
            "min_image_tokens": self.least,
            "max_image_tokens": self.most,
            "tile_size": 64,
            "do_image_splitting": True,
        }
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(settings))

    def __call__(self, images: Any, return_tensors: str) -> dict[str, Tensor]:
        shown = images if isinstance(images, list) else [images]
        views = [self.view(image) for image in shown]
        grids = [(view.shape[1] // self.patch, view.shape[2] // self.patch) for view in views]
        longest = self.most * self.factor**2
        patches = torch.zeros(len(views), longest, 3 * self.patch**2)
        mask = torch.zeros(len(views), longest, dtype=torch.int32)
        for number, (view, (rows, columns)) in enumerate(zip(views, grids, strict=True)):
            split = view.reshape(3, rows, self.patch, columns, self.patch)
            flat = split.permute(1, 3, 2, 4, 0).reshape(rows * columns, -1)
            patches[number, : rows * columns], mask[number, : rows * columns] = flat, 1
        return {
            "pixel_values": patches,
            "pixel_attention_mask": mask,
            "spatial_shapes": torch.tensor(grids),
        }

    def view(self, image: Image.Image) -> Tensor:
        """Resized by Pillow and normalised: [3, H, W]."""
        height, width = self.smart_resize(image.height, image.width)
        resized = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
        mean = torch.tensor([0.5] * 3) * (1.0 / (1 / 255))
        levels = torch.from_numpy(resized.copy()).permute(2, 0, 1).float()
        return (levels - mean[:, None, None]) / mean[:, None, None]

    def smart_resize(self, height: int, width: int) -> tuple[int, int]:
        factor = self.patch * self.factor
        least, most = (tokens * factor**2 for tokens in (self.least, self.most))
        tall, wide = (max(factor, round(side / factor) * factor) for side in (height, width))
        if tall * wide > most:
            beta = math.sqrt((height * width) / most)
            tall = max(factor, math.floor(height / beta / factor) * factor)
            wide = max(factor, math.floor(width / beta / factor) * factor)
        elif tall * wide < least:
            beta = math.sqrt(least / (height * width))
            tall = math.ceil(height * beta / factor) * factor
            wide = math.ceil(width * beta / factor) * factor
        return tall, wide


def lfm2_vl(layers: tuple[str, ...] = (), norm: bool = False, **text: Any) -> Family:
    """Views of 4 to 24 tokens of 16 x 16 pixels; every other layer has attention, the first too."""
    count = text.pop("num_hidden_layers", 3)
    kinds = layers or tuple("conv" if n % 2 else "full_attention" for n in range(count))
    own = {"intermediate_size": 72, "block_multiple_of": 16, "layer_types": list(kinds)}
    text_config = Lfm2Config(**{**TEXT, **own, "num_hidden_layers": len(kinds), **text})
    vision = Siglip2VisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=8,
        num_patches=36,
        vision_use_head=False,
    )
    config = Lfm2VlConfig(
        vision_config=vision,
        text_config=text_config,
        image_token_id=4,
        projector_hidden_size=40,
        projector_use_layernorm=norm,
    )
    model = settled(Lfm2VlForConditionalGeneration(config))
    tokens = {"image_start": "<|image_start|>", "image_end": "<|image_end|>"}
    sizes = Size(84, 84), Size(60, 100), Size(110, 41)
    return Family("lfm2_vl", model, Oracle(), "<image>", tokens, sizes)
