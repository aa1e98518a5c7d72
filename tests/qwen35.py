"""A tiny random checkpoint of Qwen3.5, in the layout that transformers saves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

from benchmarks.qwen3_shapes import PREPROCESSOR
from benchmarks.qwen_shapes import TEMPLATE, write_tokenizer
from tests.families import settled, uneven_norms

PUBLISHED = ("linear_attention",) * 3 + ("full_attention",)
"""Kinds of layers, again and again."""
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "vocab_size": 270,
    "max_position_embeddings": 1024,
}
# images (width, height) that the processor makes these sizes of: Qwen3-VL's
IMAGE_SIZES = {"256x256": (250, 262), "384x192": (390, 190), "224x320": (230, 310)}


def checkpoint(
    folder: Path, layers: int = 3, kinds: Sequence[str] = (), tied: bool = False, **text: Any
) -> Path:
    """Every other layer has attention, the first too, unless `kinds` says otherwise; a quarter of a
    head of 32 turns."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = write_tokenizer(folder)
    kinds = kinds or [PUBLISHED[-1 if n % 2 == 0 else 0] for n in range(layers)]
    sizes = {**SIZES, **text}
    pairs = sizes["head_dim"] // 8
    config = Qwen3_5Config(
        text_config={
            **sizes,
            "num_hidden_layers": len(kinds),
            "layer_types": list(kinds),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000000.0,
                "partial_rotary_factor": 0.25,
                "mrope_section": [pairs - 2 * (5 * pairs // 16), *[5 * pairs // 16] * 2],
                "mrope_interleaved": True,
            },
            "bos_token_id": tokens["<|endoftext|>"],
            "eos_token_id": tokens["<|im_end|>"],
            "tie_word_embeddings": tied,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 64,
            "patch_size": 16,
            "out_hidden_size": sizes["hidden_size"],
            "num_position_embeddings": 49,
        },
        image_token_id=tokens["<|image_pad|>"],
        video_token_id=tokens["<|video_pad|>"],
        vision_start_token_id=tokens["<|vision_start|>"],
        vision_end_token_id=tokens["<|vision_end|>"],
        tie_word_embeddings=tied,
    )
    model = uneven_norms(settled(Qwen3_5ForConditionalGeneration(config)))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("A_log"):  # a state of many tokens
                weight -= 2
            elif "language_model" in name and "norm" in name and "linear_attn" not in name:
                weight -= 1  # as these are stored
    model.to(torch.float32).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder
