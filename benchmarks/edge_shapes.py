"""Small models that edge devices run, and larger ones of their families, in published sizes."""

from __future__ import annotations

from typing import Any

from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    Glm46VConfig,
    GraniteConfig,
    Idefics3Config,
    Idefics3VisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    Ministral3Config,
    Mistral3Config,
    PaliGemmaConfig,
    PixtralVisionConfig,
    SiglipVisionConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from benchmarks.published_shape import IMAGE_TOKEN, VIDEO_TOKEN, Published
from edgeprune.tiling import Size

HALVES = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
PINPOINTS = [[384 * n, 384 * m] for n in range(1, 11) for m in range(1, 11) if n * m <= 10]
IDEFICS3_TOKENS = "<fake_token_around_image>", "<global-img>"


def _so400m(side: int) -> SiglipVisionConfig:
    """SigLIP so400m / 14."""
    return SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=side,
        patch_size=14,
        vision_use_head=False,
    )


def _llama(layers: int, width: int, mlp: int, heads: int, kv_heads: int, vocabulary: int) -> Any:
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    )


def _smolvlm(text: LlamaConfig) -> Idefics3Config:
    """The 256M and 500M models: tiles of 512 pixels, 64 tokens each."""
    vision = Idefics3VisionConfig(
        hidden_size=768, num_attention_heads=12, image_size=512, patch_size=16
    )
    return Idefics3Config(
        vision_config=vision, text_config=text, scale_factor=4, image_token_id=IMAGE_TOKEN
    )


def _smolvlm_2b() -> Idefics3Config:
    vision = Idefics3VisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    )
    text = _llama(24, 2048, 8192, 32, 32, 49280)
    return Idefics3Config(
        vision_config=vision, text_config=text, scale_factor=3, image_token_id=IMAGE_TOKEN
    )


def _gemma3_4b() -> Gemma3Config:
    text = Gemma3TextConfig(
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=34,
        sliding_window=1024,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
    return Gemma3Config(
        vision_config=_so400m(896),
        text_config=text,
        boi_token_index=VIDEO_TOKEN,
        eoi_token_index=VIDEO_TOKEN + 1,
        image_token_index=VIDEO_TOKEN + 2,
    )


def _paligemma2_3b(side: int) -> PaliGemmaConfig:
    text = Gemma2Config(vocab_size=257216)
    return PaliGemmaConfig(
        vision_config=_so400m(side),
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        projection_dim=2304,
    )


def _granite_vision_2b() -> LlavaNextConfig:
    text = GraniteConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=40,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=49156,
        max_position_embeddings=131072,
        embedding_multiplier=12,
        residual_multiplier=0.22,
        attention_multiplier=0.015625,
        logits_scaling=8,
    )
    return LlavaNextConfig(
        vision_config=_so400m(384),
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=[-24, -20, -12, -1],
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )


PIXTRAL = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "hidden_act": "silu",
}


def _ministral3(layers: int, width: int, mlp: int, tied: bool) -> Mistral3Config:
    """Heads of 128, 32 of queries and 8 of keys; rotary settings are the config's defaults."""
    text = Ministral3Config(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=32,
        tie_word_embeddings=tied,
    )
    return Mistral3Config(
        vision_config=PixtralVisionConfig(**PIXTRAL, image_size=1540, patch_size=14),
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        tie_word_embeddings=tied,
    )


def _glm46v() -> Glm46VConfig:
    """Sizes are the configs' defaults."""
    text = {"model_type": "glm4v_text", "max_position_embeddings": 131072}
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 500000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [8, 12, 12],
    }
    return Glm46VConfig(text_config=text, image_token_id=IMAGE_TOKEN, video_token_id=VIDEO_TOKEN)


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def _idefics3_processor(tile: int, edge: int) -> Any:
    return Idefics3ImageProcessorPil(
        size={"longest_edge": edge}, max_image_size={"longest_edge": tile}, **HALVES
    )


def _pixtral_processor(step: int) -> Any:
    return PixtralImageProcessorPil(size={"longest_edge": 1540}, patch_size=_square(step))


EDGE_SHAPES = {
    "glm46v-flash-9b": Published(_glm46v, Glm46VImageProcessorPil, Size(476, 644)),
    "ministral3-3b": Published(
        lambda: _ministral3(26, 3072, 9216, True),
        lambda: _pixtral_processor(28),
        Size(476, 644),
        tokens=("[IMG_BREAK]", "[IMG_END]"),
    ),
    "ministral3-8b": Published(
        lambda: _ministral3(34, 4096, 14336, False),
        lambda: _pixtral_processor(28),
        Size(476, 644),
        tokens=("[IMG_BREAK]", "[IMG_END]"),
    ),
    "smolvlm-256m": Published(
        lambda: _smolvlm(_llama(30, 576, 1536, 9, 3, 49280)),
        lambda: _idefics3_processor(512, 2048),
        tokens=IDEFICS3_TOKENS,
    ),
    "smolvlm-500m": Published(
        lambda: _smolvlm(_llama(32, 960, 2560, 15, 5, 49280)),
        lambda: _idefics3_processor(512, 2048),
        Size(480, 640),
        tokens=IDEFICS3_TOKENS,
    ),
    "smolvlm-2.2b": Published(
        _smolvlm_2b,
        lambda: _idefics3_processor(384, 1536),
        Size(480, 640),
        tokens=IDEFICS3_TOKENS,
    ),
    "gemma3-4b": Published(
        _gemma3_4b,
        lambda: Gemma3ImageProcessorPil(size=_square(896), **HALVES),
        tokens=("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
    ),
    "paligemma2-3b-448": Published(
        lambda: _paligemma2_3b(448), lambda: SiglipImageProcessorPil(size=_square(448), **HALVES)
    ),
    "granite-vision-2b": Published(
        _granite_vision_2b,
        lambda: LlavaNextImageProcessorPil(
            size=_square(384),
            crop_size=_square(384),
            image_grid_pinpoints=PINPOINTS,
            **HALVES,
        ),
        Size(768, 768),
    ),
}
