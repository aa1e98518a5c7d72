"""Tiny random checkpoints of LFM2-VL, and what transformers' image processor does: itself it needs
torchvision."""

from __future__ import annotations

import json
import math
from dataclasses import replace
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
    """The processor in transformers: `_preprocess`, `resize_and_split` and what they call."""

    patch, factor, least, most = 8, 2, 4, 24
    tile, tiles, tolerance = 80, (2, 10), 2.0
    thumbnail = True

    def save_pretrained(self, folder: Path) -> None:
        settings = {
            "image_processor_type": "Lfm2VlImageProcessorFast",
            "encoder_patch_size": self.patch,
            "downsample_factor": self.factor,
            "min_image_tokens": self.least,
            "max_image_tokens": self.most,
            "tile_size": self.tile,
            "min_tiles": self.tiles[0],
            "max_tiles": self.tiles[1],
            "use_thumbnail": self.thumbnail,
            "max_pixels_tolerance": self.tolerance,
            "do_image_splitting": True,
        }
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(settings))

    def __call__(self, images: Any, return_tensors: str) -> dict[str, Tensor]:
        shown = images if isinstance(images, list) else [images]
        views = [view for image in shown for view in self.views(image)]
        grids = [(view.shape[1] // self.patch, view.shape[2] // self.patch) for view in views]
        longest = max(self.most * self.factor**2, (self.tile // self.patch) ** 2)
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

    def views(self, image: Image.Image) -> list[Tensor]:
        """An image, or its tiles row by row and its thumbnail: each [3, H, W]."""
        if not self.is_large(image.height, image.width):
            return [self.view(image)]
        (across, down), side = self.grid(image.height, image.width), self.tile
        whole = self.normalised(image.resize((across * side, down * side), 2))
        split = whole.view(3, down, side, across, side).permute(1, 3, 0, 2, 4)
        return [*split.flatten(0, 1), *([self.view(image)] if self.thumbnail else [])]

    def is_large(self, height: int, width: int) -> bool:
        step = self.patch * self.factor
        tall, wide = (max(self.patch, round(side / step) * step) for side in (height, width))
        return tall * wide > self.most * step**2 * self.tolerance

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Columns and rows: `find_closest_aspect_ratio`."""
        least, most = self.tiles
        sides = range(1, most + 1)
        pairs = {(w, h) for w in sides for h in sides if least <= w * h <= most}
        best, difference = (1, 1), math.inf
        for w, h in sorted(pairs, key=lambda pair: pair[0] * pair[1]):
            found = abs(width / height - w / h)
            closer = found < difference
            if closer or (found == difference and width * height > 0.5 * self.tile**2 * w * h):
                best, difference = (w, h), found
        return best

    def view(self, image: Image.Image) -> Tensor:
        """Resized by Pillow and normalised: [3, H, W]."""
        height, width = self.smart_resize(image.height, image.width)
        return self.normalised(image.resize((width, height), Image.Resampling.BILINEAR))

    def normalised(self, image: Image.Image) -> Tensor:
        resized = np.asarray(image)
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


SPLIT = Size(150, 160), Size(100, 210), Size(330, 110)
"""Of images that are cut into 2 x 2, 1 x 2 and 3 x 1 tiles."""
PLACES = [f"<|img_row_{row}_col_{column}|>" for row in range(1, 4) for column in range(1, 4)]


def lfm2_vl_tiles(**text: Any) -> Family:
    """The same model, shown images that are cut into tiles."""
    return replace(lfm2_vl(**text), sizes=SPLIT)


def lfm2_vl(layers: tuple[str, ...] = (), norm: bool = False, **text: Any) -> Family:
    """Views of 4 to 24 tokens of 16 x 16 pixels, tiles of 25; every other layer has attention, the
    first too."""
    count = text.pop("num_hidden_layers", 3)
    kinds = layers or tuple("conv" if n % 2 else "full_attention" for n in range(count))
    own = {"intermediate_size": 72, "block_multiple_of": 16, "layer_types": list(kinds)}
    own["vocab_size"] = 84  # with tokens between tiles
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
    marks = ("<|image_start|>", "<|image_end|>", "<|img_thumbnail|>", *PLACES)
    tokens = {f"mark_{number}": mark for number, mark in enumerate(marks)}
    sizes = Size(84, 84), Size(60, 100), Size(110, 41)
    return Family("lfm2_vl", model, Oracle(), "<image>", tokens, sizes)
