"""Tiny random checkpoints of Ministral 3, Mistral Small 3.1 and Pixtral."""

from __future__ import annotations

from typing import Any

from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Ministral3Config,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
)
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from edgeprune.tiling import Size
from tests.families import SMALL_TOWER, TEXT, Family, settled, uneven_norms

PIXTRAL = {**SMALL_TOWER, "image_size": 336, "patch_size": 14, "hidden_act": "silu", "head_dim": 16}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 2.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def ministral3(**text: Any) -> Family:
    """Ministral 3: a token for 28 x 28 pixels; queries are scaled behind `original` positions."""
    own = {"head_dim": 16, "max_position_embeddings": 1024, **text}
    scaled = own.pop("original", 512)
    rope = {**YARN, "original_max_position_embeddings": scaled}
    return _mistral3(Ministral3Config(**{**TEXT, **own, "rope_parameters": rope}))


def mistral_small(**text: Any) -> Family:
    """Mistral Small 3.1: the same with Mistral's decoder."""
    return _mistral3(MistralConfig(**{**TEXT, "sliding_window": None, **text}))


def _mistral3(text: Any) -> Family:
    config = Mistral3Config(
        vision_config=PixtralVisionConfig(**PIXTRAL),
        text_config=text,
        image_token_index=4,
        tie_word_embeddings=False,
    )
    return _pixtral("mistral3", Mistral3ForConditionalGeneration(config), 28)


def pixtral(**text: Any) -> Family:
    """Pixtral 12B: a token for 14 x 14 pixels, a LLaVA's projector."""
    config = LlavaConfig(
        vision_config=PixtralVisionConfig(**PIXTRAL),
        text_config=MistralConfig(**{**TEXT, "sliding_window": None, **text}),
        image_token_index=4,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return _pixtral("pixtral", LlavaForConditionalGeneration(config), 14)


def _pixtral(name: str, model: Any, step: int) -> Family:
    """Its processor gives `step`, patch times merge, to the image processor."""
    processor = PixtralImageProcessorPil(
        size={"longest_edge": 140}, patch_size={"height": step, "width": step}
    )
    shapes = Size(84, 84), Size(112, 140), Size(140, 56)
    marks = {"break_token": "[IMG_BREAK]", "end_token": "[IMG_END]"}
    return Family(name, uneven_norms(settled(model)), processor, "<image>", marks, shapes)
