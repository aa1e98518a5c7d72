"""Checkpoints with the published sizes of real models: all zeros in files that take no disk, or
random weights.

    python -m benchmarks.published internvl3-8b checkpoints/internvl3-8b

Sizes, towers and image processors are those of the models' own config files; the tokenizer is the
demo's, so the image token has another number.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    Qwen2Config,
    SiglipVisionConfig,
    VideoLlavaConfig,
    VideoLlavaImageProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from benchmarks.edge_shapes import EDGE_SHAPES
from benchmarks.lfm2_shapes import LFM2_SHAPES
from benchmarks.original_shapes import ORIGINALS, Original
from benchmarks.published_shape import IMAGE_TOKEN, VIDEO_TOKEN, Published
from benchmarks.qwen3_5_shapes import QWEN35_SHAPES
from benchmarks.qwen3_shapes import QWEN3_SHAPES, Qwen3Shape
from benchmarks.qwen_shapes import SHAPES, QwenShape
from edgeprune.tiling import Size


def _clip(side: int = 336) -> CLIPVisionConfig:
    """CLIP-L/14."""
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=side,
        patch_size=14,
        projection_dim=768,
    )


def _vicuna(layers: int, width: int, mlp: int, heads: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=32064,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )


def _qwen2(layers: int, width: int, mlp: int, heads: tuple[int, int], vocabulary: int) -> Any:
    return Qwen2Config(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        vocab_size=vocabulary,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )


def _llava(text: LlamaConfig) -> LlavaConfig:
    return LlavaConfig(vision_config=_clip(), text_config=text, image_token_id=IMAGE_TOKEN)


def _llava_next() -> LlavaNextConfig:
    text = _vicuna(32, 4096, 11008, 32)
    return LlavaNextConfig(vision_config=_clip(), text_config=text, image_token_index=IMAGE_TOKEN)


def _video_llava() -> VideoLlavaConfig:
    return VideoLlavaConfig(
        vision_config=_clip(224),
        text_config=_vicuna(32, 4096, 11008, 32),
        image_token_index=IMAGE_TOKEN,
        video_token_index=VIDEO_TOKEN,
    )


def _onevision(layers: int, width: int, mlp: int, heads: tuple[int, int], tied: bool) -> Any:
    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=26,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )
    text = _qwen2(layers, width, mlp, heads, 152000)
    text.tie_word_embeddings = tied
    return LlavaOnevisionConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN
    )


def _internvl3_8b() -> InternVLConfig:
    text = _qwen2(28, 3584, 18944, (28, 4), 151674)
    text.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}
    return InternVLConfig(
        vision_config=InternVLVisionConfig(attention_bias=True),
        text_config=text,
        image_token_id=IMAGE_TOKEN,
        tie_word_embeddings=False,
    )


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def _clip_processor() -> Any:
    return CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=_square(336))


def _next_processor() -> Any:
    return LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size=_square(336))


def _internvl_processor() -> Any:
    return GotOcr2ImageProcessorPil(size=_square(448), crop_to_patches=True)


PUBLISHED: dict[str, Published | QwenShape | Qwen3Shape | Original] = {
    "llava-1.5-7b": Published(lambda: _llava(_vicuna(32, 4096, 11008, 32)), _clip_processor),
    "llava-1.5-13b": Published(lambda: _llava(_vicuna(40, 5120, 13824, 40)), _clip_processor),
    "llava-next-7b": Published(_llava_next, _next_processor, Size(672, 672)),
    "video-llava-7b": Published(_video_llava, VideoLlavaImageProcessor, frames=8),
    "onevision-0.5b": Published(
        lambda: _onevision(24, 896, 4864, (14, 2), True), LlavaOnevisionImageProcessorPil
    ),
    "onevision-7b": Published(
        lambda: _onevision(28, 3584, 18944, (28, 4), False), LlavaOnevisionImageProcessorPil
    ),
    "internvl3-8b": Published(_internvl3_8b, _internvl_processor),
    **EDGE_SHAPES,
    **LFM2_SHAPES,
    **SHAPES,
    **QWEN3_SHAPES,
    **QWEN35_SHAPES,
    **ORIGINALS,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a checkpoint of published sizes.")
    parser.add_argument("name", choices=PUBLISHED)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--random", action="store_true", help="random weights, not zeros")
    args = parser.parse_args()
    print(PUBLISHED[args.name].write(args.folder, sparse=not args.random))


if __name__ == "__main__":
    main()
