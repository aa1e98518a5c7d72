"""Qwen3-VL checkpoints in the published layout, of real sizes or tiny ones.

python -m benchmarks.published qwen3-vl-2b checkpoints/qwen3-vl-2b

The tokenizer is a small one, so the ids of special tokens are its own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.qwen_shapes import TEMPLATE, Sizes, linear, norm, write_tokenizer
from benchmarks.shapes import SHARD, write_random, write_sparse
from edgeprune.models import Adapter, open_model
from edgeprune.tiling import Size

PATCH, FRAMES, MERGE = 16, 2, 2
TEXT = "model.language_model."


@dataclass(frozen=True)
class Qwen3Shape:
    """Sizes of a decoder and of the vision tower before it."""

    layers: int
    width: int
    mlp: int
    heads: int
    kv_heads: int
    head: int = 128
    vocabulary: int = 151936
    tied: bool = True
    positions: int = 262144
    blocks: int = 24
    vision_width: int = 1024
    vision_mlp: int = 4096
    vision_heads: int = 16
    deepstack: tuple[int, ...] = (5, 11, 17)
    grid: int = 2304  # positions that the tower has learned
    size: Size | None = None  # of images; None: the family's default

    def write(
        self,
        folder: Path,
        *,
        sparse: bool = True,
        dtype: torch.dtype = torch.float16,
        shard_bytes: int = SHARD,
    ) -> Path:
        """A checkpoint that transformers loads: random, or (sparse) zeros that take no disk."""
        folder.mkdir(parents=True, exist_ok=True)
        tokens = write_tokenizer(folder)
        config = self.config(tokens, str(dtype).removeprefix("torch."))
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
        (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
        if sparse:
            write_sparse(dict(self.tensors()), folder)
        else:
            write_random(dict(self.tensors()), folder, 0, dtype, shard_bytes)
        return folder

    def config(self, tokens: dict[str, int], dtype: str) -> dict[str, Any]:
        """config.json, with the ids of special tokens."""
        return _config(self, tokens, dtype)

    def tensors(self) -> Sizes:
        """Names and shapes as the published checkpoints store them."""
        yield from ends(self)
        for layer in range(self.layers):
            prefix = f"{TEXT}layers.{layer}."
            yield from attention(self, prefix)
            yield from mlp_and_norms(self, prefix)
        yield from vision_tensors(self)

    def open(self, folder: Path) -> Adapter:
        """The checkpoint, frozen for images of this size."""
        return open_model(str(folder), size=self.size)


QWEN3_SHAPES = {
    "qwen3-vl-2b": Qwen3Shape(28, 2048, 6144, 16, 8, size=Size(480, 640)),
    "qwen3-vl-4b": Qwen3Shape(36, 2560, 9728, 32, 8, size=Size(480, 640)),
    "qwen3-vl-8b": Qwen3Shape(
        36,
        4096,
        12288,
        32,
        8,
        tied=False,
        blocks=27,
        vision_width=1152,
        vision_mlp=4304,
        deepstack=(8, 16, 24),
        size=Size(480, 640),
    ),
}
"""Images of 640 x 480 are 300 visual tokens."""

PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "processor_class": "Qwen3VLProcessor",
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": PATCH,
    "temporal_patch_size": FRAMES,
    "merge_size": MERGE,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def _config(shape: Qwen3Shape, tokens: dict[str, int], dtype: str) -> dict[str, Any]:
    """As transformers 4.57 writes it."""
    pairs = shape.head // 2
    row = 5 * pairs // 16
    text = {
        "model_type": "qwen3_vl_text",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": tokens["<|endoftext|>"],
        "eos_token_id": tokens["<|im_end|>"],
        "dtype": dtype,
        "head_dim": shape.head,
        "hidden_act": "silu",
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.positions,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000000,
        "rope_scaling": {
            "mrope_interleaved": True,
            "mrope_section": [pairs - 2 * row, row, row],
            "rope_type": "default",
        },
        "tie_word_embeddings": shape.tied,
        "use_cache": True,
    }
    vision = {
        "model_type": "qwen3_vl",
        "depth": shape.blocks,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": shape.vision_width,
        "intermediate_size": shape.vision_mlp,
        "num_heads": shape.vision_heads,
        "in_channels": 3,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": FRAMES,
        "num_position_embeddings": shape.grid,
        "deepstack_visual_indexes": list(shape.deepstack),
        "out_hidden_size": shape.width,
    }
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": tokens["<|image_pad|>"],
        "video_token_id": tokens["<|video_pad|>"],
        "vision_start_token_id": tokens["<|vision_start|>"],
        "vision_end_token_id": tokens["<|vision_end|>"],
        "tie_word_embeddings": shape.tied,
        "transformers_version": "4.57.0.dev0",
        "text_config": text,
        "vision_config": vision,
    }


def ends(shape: Qwen3Shape) -> Sizes:
    """Embedding, last norm and head."""
    if not shape.tied:
        yield "lm_head.weight", (shape.vocabulary, shape.width)
    yield f"{TEXT}embed_tokens.weight", (shape.vocabulary, shape.width)
    yield f"{TEXT}norm.weight", (shape.width,)


def attention(shape: Qwen3Shape, prefix: str, gates: int = 0) -> Sizes:
    """Of a layer; with as many `gates` as there are queries, these lie beside them."""
    inner, kv = shape.heads * shape.head, shape.kv_heads * shape.head
    for name, size in (("q", inner + gates), ("k", kv), ("v", kv)):
        yield f"{prefix}self_attn.{name}_proj.weight", (size, shape.width)
    yield f"{prefix}self_attn.o_proj.weight", (shape.width, inner)
    for name in ("q_norm", "k_norm"):
        yield f"{prefix}self_attn.{name}.weight", (shape.head,)


def mlp_and_norms(shape: Qwen3Shape, prefix: str) -> Sizes:
    """Of any layer."""
    for name in ("gate", "up"):
        yield f"{prefix}mlp.{name}_proj.weight", (shape.mlp, shape.width)
    yield f"{prefix}mlp.down_proj.weight", (shape.width, shape.mlp)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}{name}.weight", (shape.width,)


def vision_tensors(shape: Qwen3Shape) -> Sizes:
    width, joined, tower = shape.vision_width, MERGE**2 * shape.vision_width, "model.visual."
    yield f"{tower}patch_embed.proj.weight", (width, 3, FRAMES, PATCH, PATCH)
    yield f"{tower}patch_embed.proj.bias", (width,)
    yield f"{tower}pos_embed.weight", (shape.grid, width)
    for block in range(shape.blocks):
        prefix = f"{tower}blocks.{block}."
        for name in ("norm1", "norm2"):
            yield from norm(f"{prefix}{name}", width, bias=True)
        yield from linear(f"{prefix}attn.qkv", 3 * width, width)
        yield from linear(f"{prefix}attn.proj", width, width)
        yield from linear(f"{prefix}mlp.linear_fc1", shape.vision_mlp, width)
        yield from linear(f"{prefix}mlp.linear_fc2", width, shape.vision_mlp)
    mergers = [(f"{tower}merger", width)]
    mergers += [(f"{tower}deepstack_merger_list.{n}", joined) for n in range(len(shape.deepstack))]
    for merger, normed in mergers:
        yield from norm(f"{merger}.norm", normed, bias=True)
        yield from linear(f"{merger}.linear_fc1", joined, joined)
        yield from linear(f"{merger}.linear_fc2", shape.width, joined)
