"""Tiny random checkpoints of Gemma 3, PaliGemma and PaliGemma 2."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from edgeprune.tiling import Size
from tests.families import SMALL_TOWER, TEXT, Family, settled


def gemma3(**text: Any) -> Family:
    """Images of 48 pixels, 16 tokens; windows of 12 tokens in two layers of three."""
    own = {
        "head_dim": 16,
        "query_pre_attn_scalar": 12,
        "sliding_window": 12,
        "sliding_window_pattern": 2,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "max_position_embeddings": 1024,
    }
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**SMALL_TOWER, vision_use_head=False),
        text_config=Gemma3TextConfig(**{**TEXT, **own, **text}),
        mm_tokens_per_image=16,
        boi_token_index=67,
        eoi_token_index=68,
        image_token_index=66,
    )
    tokens = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    return Family(
        "gemma3",
        offset_norms(settled(Gemma3ForConditionalGeneration(config))),
        Gemma3ImageProcessorPil(size={"height": 48, "width": 48}),
        "<start_of_image>",
        tokens,
        (Size(84, 84), Size(60, 101), Size(211, 41)),
        tiled=False,
    )


def paligemma(**text: Any) -> Family:
    """Images of 48 pixels, 64 tokens; the decoder is Gemma, with one key for all heads."""
    own = {"head_dim": 16, "num_key_value_heads": 1}
    return _paligemma(GemmaConfig(**{**TEXT, **own, **text}))


def paligemma2(**text: Any) -> Family:
    """The same with Gemma 2, whose first layer and third have windows of 12 tokens."""
    own = {"head_dim": 16, "query_pre_attn_scalar": 12, "sliding_window": 12}
    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
    return _paligemma(Gemma2Config(**{**TEXT, **own, **caps, **text}))


def _paligemma(text: Any) -> Family:
    tower = SiglipVisionConfig(**SMALL_TOWER, vision_use_head=False)
    config = PaliGemmaConfig(
        vision_config=tower, text_config=text, image_token_index=4, projection_dim=32
    )
    model = offset_norms(settled(PaliGemmaForConditionalGeneration(config)))
    model.set_attn_implementation("eager")  # torch's own attention leaves out the cap
    return Family(
        "paligemma",
        model,
        SiglipImageProcessorPil(
            size={"height": 48, "width": 48}, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        "<image>",
        {},
        (Size(84, 84), Size(60, 101), Size(211, 41)),
        tiled=False,
    )


def offset_norms(model: Any) -> Any:
    """A model whose norms are stored less 1, with weights that are not all alike."""
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, std=1.0)
    return model
