"""The model: an InternVL in small, tiles of 56 pixels that are 16 visual tokens each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    Qwen2Config,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from benchmarks.demo.build import BOS, EOS, PAD, WORDS
from benchmarks.tiles.scenes import TILE
from edgeprune.demo import MODEL_DIR

PATCH, WIDTH = 7, 128
TOKENS = (TILE // (2 * PATCH)) ** 2
"""Of a tile."""
NAMES = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")
START, END, IMAGE, VIDEO = range(len(WORDS), len(WORDS) + len(NAMES))
MEAN, STD = 0.5, 0.25


def make_model(seed: int = 0) -> Any:
    """Fresh float32 weights: blocks start as the identity, and the decoder's keys equal its
    queries, so that a word attends from the start to the visual tokens that carry it."""
    torch.manual_seed(seed)
    vision = InternVLVisionConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=TILE,
        patch_size=PATCH,
        attention_bias=True,
        layer_scale_init_value=1.0,
    )
    text = Qwen2Config(
        vocab_size=len(WORDS) + len(NAMES),
        hidden_size=WIDTH,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    config = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        image_seq_length=TOKENS,
        tie_word_embeddings=False,
    )
    model = InternVLForConditionalGeneration(config).float()
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and ("layer" in name or "projector" in name):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        if name.split(".")[-2] in ("o_proj", "down_proj", "projection_layer", "fc2"):
            nn.init.zeros_(weight)
        if name.endswith("position_embeddings"):
            nn.init.normal_(weight, std=0.2)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
    return model


def save(model: Any, folder: Path) -> None:
    """The checkpoint in float16, with tokenizer, template and settings of the image processor."""
    half = InternVLForConditionalGeneration(model.config)
    half.load_state_dict(model.state_dict())
    half.half()
    half.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, max_new_tokens=8, do_sample=False
    )
    half.save_pretrained(folder)
    GotOcr2ImageProcessorPil(
        size={"height": TILE, "width": TILE},
        crop_to_patches=False,
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    ).save_pretrained(folder)
    roles = ("start_image_token", "end_image_token", "context_image_token", "video_token")
    tokens = dict(zip(roles, NAMES, strict=True))
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR, extra_special_tokens=tokens)
    template = (MODEL_DIR / "chat_template.jinja").read_text()
    tokenizer.chat_template = template.replace("<image>", NAMES[2])
    tokenizer.save_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids(list(NAMES)) == [START, END, IMAGE, VIDEO]
