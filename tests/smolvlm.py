"""Tiny random checkpoints of SmolVLM and Idefics3."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3VisionConfig,
    LlamaConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMVisionConfig,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from edgeprune.tiling import Size
from tests.families import SMALL_TOWER, TEXT, Family, settled


def smolvlm(**text: Any) -> Family:
    """One tile of 48 pixels, 16 tokens; as SmolVLM2 is published."""
    return _smol("smolvlm", text)


def smolvlm_tiles(**text: Any) -> Family:
    """The same with 7 to 17 tiles, as the processor cuts an image by default."""
    return replace(smolvlm(**text), tiled=True)


def idefics3(**text: Any) -> Family:
    """The same as SmolVLM and Idefics3 are published."""
    return _smol("idefics3", text)


def _smol(name: str, text: dict[str, Any]) -> Family:
    vision, config, model, processor = {
        "smolvlm": (
            SmolVLMVisionConfig,
            SmolVLMConfig,
            SmolVLMForConditionalGeneration,
            SmolVLMImageProcessorPil,
        ),
        "idefics3": (
            Idefics3VisionConfig,
            Idefics3Config,
            Idefics3ForConditionalGeneration,
            Idefics3ImageProcessorPil,
        ),
    }[name]
    found = config(
        vision_config=vision(**SMALL_TOWER),
        text_config=LlamaConfig(**{**TEXT, **text}),
        scale_factor=2,
        image_token_id=4,
    )
    edges = {"size": {"longest_edge": 192}, "max_image_size": {"longest_edge": 48}}
    means = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    tokens = {"fake_token": "<fake_token_around_image>", "global_token": "<global-img>"}
    return Family(
        name,
        settled(model(found)),
        processor(**edges, **means),
        "<image>",
        tokens,
        (Size(84, 84), Size(60, 101), Size(211, 41)),
        tiled=False,
    )
