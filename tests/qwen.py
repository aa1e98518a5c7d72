"""Tiny random Qwen2-VL and Qwen2.5-VL checkpoints, and pictures for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.qwen_shapes import QwenShape, write

TINY = QwenShape(
    layers=2,
    width=64,
    mlp=96,
    heads=4,
    kv_heads=2,
    vocabulary=270,
    positions=512,
    blocks=2,
    vision_width=32,
    vision_mlp=64,
    vision_heads=2,
    full=(1,),
)
# pictures (width, height) that the processor makes these sizes of; windows are 112 pixels a side
PICTURES = {"224x112": (220, 118), "84x168": (90, 160), "196x140": (190, 150)}
QUESTION = "what is it ?"


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def plain_checkpoint(folder: Path, layers: int = TINY.layers) -> Path:
    """A Qwen2-VL in shards, fp16, tied embeddings."""
    shape = replace(TINY, tied=True, layers=layers)
    return write(shape, folder, dtype=torch.float16, shard_bytes=200_000)


def windowed_checkpoint(folder: Path, layers: int = TINY.layers) -> Path:
    """A Qwen2.5-VL in one shard, bf16, an output head of its own."""
    return write(replace(TINY, windowed=True, layers=layers), folder, dtype=torch.bfloat16)
