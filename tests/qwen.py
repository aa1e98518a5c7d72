"""Tiny random checkpoints of the Qwen-VL families, images, and what transformers answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, GenerationConfig

from benchmarks.qwen3_shapes import Qwen3Shape
from benchmarks.qwen_shapes import QwenShape, write
from edgeprune.models import Adapter
from edgeprune.models._processor import Processor
from tests.dense import MORE, assert_same_logits, dense

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
STACKED = Qwen3Shape(
    layers=4,
    width=64,
    mlp=96,
    heads=4,
    kv_heads=2,
    head=32,  # not width / heads, as of the 4B
    vocabulary=270,
    tied=False,
    positions=1024,
    blocks=4,
    vision_width=32,
    vision_mlp=64,
    vision_heads=2,
    deepstack=(0, 1, 2),
    grid=49,
)
# images (width, height) that the processor makes these sizes of; windows are 112 pixels a side
IMAGES = {"224x112": (220, 118), "84x168": (90, 160), "196x140": (190, 150)}
# the same of Qwen3-VL: its processor makes images of 65,536 pixels and more
STACKED_IMAGES = {"256x256": (250, 262), "384x192": (390, 190), "224x320": (230, 310)}
QUESTION = "what is it ?"


def drawn_image(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def plain_checkpoint(folder: Path, layers: int = TINY.layers) -> Path:
    """A Qwen2-VL in shards, fp16, tied embeddings."""
    shape = replace(TINY, tied=True, layers=layers)
    return write(shape, folder, dtype=torch.float16, shard_bytes=200_000)


def windowed_checkpoint(folder: Path, layers: int = TINY.layers) -> Path:
    """A Qwen2.5-VL in one shard, bf16, an output head of its own."""
    return write(replace(TINY, windowed=True, layers=layers), folder, dtype=torch.bfloat16)


def stacked_checkpoint(folder: Path, layers: int = STACKED.layers) -> Path:
    """A Qwen3-VL in shards, fp32, an output head of its own."""
    shape = replace(STACKED, layers=layers)
    return shape.write(folder, sparse=False, dtype=torch.float32, shard_bytes=200_000)


def patches(adapter: Adapter, pixels: torch.Tensor) -> torch.Tensor:
    """Frames [n, 3, H, W] as transformers' video processor cuts them: [patches, values]."""
    rows, columns = adapter.vision_config.layout.tile_grid
    side = adapter.vision_config.encoder.patch
    spans = pixels.view(-1, 2, 3, rows, 2, side, columns, 2, side)
    return spans.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 3 * 2 * side**2)


def inputs(adapter: Adapter, images: list[Image.Image], pixels: torch.Tensor) -> dict[str, Any]:
    """Inputs of transformers' model, its own prompt with them."""
    processor = Processor(adapter)
    ids, token = processor.chat.ids(adapter.media, QUESTION), adapter.media.token
    rows, columns = adapter.vision_config.layout.tile_grid
    spans = 1 if adapter.asked.frames is None else len(images) // 2
    each = spans if adapter.media.runs == 1 else 1  # runs may be of one span of frames each
    repeats = torch.where(ids == token, each * rows * columns, 1)
    ids = ids.repeat_interleave(repeats)[None]
    if adapter.asked.frames is None:
        encoded = processor.image_processor(images, return_tensors="pt")
        return {**encoded, "input_ids": ids, "mm_token_type_ids": (ids == token).int()}
    return {
        "pixel_values_videos": patches(adapter, pixels),
        "video_grid_thw": torch.tensor([[spans, 2 * rows, 2 * columns]]),
        "input_ids": ids,
        "mm_token_type_ids": 2 * (ids == token).int(),
    }


def generated(
    adapter: Adapter,
    images: list[Image.Image],
    pixels: torch.Tensor,
    settings: GenerationConfig | None = None,
) -> list[int]:
    """Greedy tokens of transformers' model: 32 without an end, or 64 by the settings."""
    folder = adapter.checkpoint.folder
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config = settings or GenerationConfig()  # in place of the checkpoint's own
    given = inputs(adapter, images, pixels)
    found = model.generate(
        **given,
        attention_mask=torch.ones_like(given["input_ids"]),
        max_new_tokens=64 if settings else 32,
        do_sample=False,
        pad_token_id=0,
    )
    said: list[int] = found[0, given["input_ids"].shape[1] :].tolist()
    return said


def assert_same_dialogue(
    adapter: Adapter, images: list[Image.Image], theirs: Any, **close: float
) -> None:
    """Greedy answers of 64 tokens, and logits over two turns, are those of transformers' model."""
    prompt, ours = Processor(adapter)(images, QUESTION), dense(adapter)
    wanted = generated(adapter, images, prompt.pixels, GenerationConfig(max_new_tokens=64))
    assert ours.generate(prompt, 64, lambda token: False) == wanted
    given = inputs(adapter, images, prompt.pixels)
    ids = torch.cat([given["input_ids"], MORE], 1)
    kinds = (1 if adapter.asked.frames is None else 2) * (ids == adapter.media.token).int()
    with torch.no_grad():
        logits = theirs(**{**given, "input_ids": ids, "mm_token_type_ids": kinds}).logits[0]
    assert_same_logits(ours, prompt, logits, **close)


def pruned_logits(
    model: Any, given: Mapping[str, Any], entering: Tensor, kept: Mapping[int, Tensor]
) -> Tensor:
    """Of the last token by transformers' own layers, where some visual tokens alone enter the
    first, and at each layer of `kept` some of those: [vocabulary]."""
    base, ids = model.model, given["input_ids"]
    text, visual = base.language_model, given["mm_token_type_ids"][0].bool()
    seen = base.get_image_features(given["pixel_values"], given["image_grid_thw"])
    rows = [torch.cat(list(row)) for row in getattr(seen, "deepstack_features", None) or ()]
    hidden = base.get_input_embeddings()(ids)
    hidden[:, visual] = torch.cat(list(seen.pooler_output))
    positions, _ = base.get_rope_index(ids, given["mm_token_type_ids"], given["image_grid_thw"])
    for index, layer in enumerate(text.layers):
        chosen = entering if index == 0 else kept.get(index + 1)
        if chosen is not None:
            stay = ~visual
            stay[visual.nonzero()[chosen, 0]] = True
            hidden, positions, visual = hidden[:, stay], positions[:, :, stay], visual[stay]
            rows = [row[chosen] for row in rows]
        size = hidden.shape[1]
        full = getattr(layer, "block_type", "full_attention") == "full_attention"
        mask = torch.full((1, 1, size, size), float("-inf")).triu(1) if full else None
        turned = text.rotary_emb(hidden, positions)
        hidden = layer(hidden, attention_mask=mask, position_embeddings=turned)
        if index < len(rows):
            hidden[:, visual] += rows[index]
    found: Tensor = model.lm_head(text.norm(hidden))[0, -1]
    return found
