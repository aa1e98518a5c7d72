"""Qwen2-VL and Qwen2.5-VL checkpoints in the published layout, of real sizes or tiny ones.

python -m benchmarks.qwen_shapes qwen2-vl-2b checkpoints/qwen2-vl-2b --sparse

The tokenizer is a small one made here, so the ids of special tokens are its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from benchmarks.packed_shapes import AWQ, packed
from benchmarks.shapes import SHARD, write_random, write_sparse
from edgeprune.models import Adapter, open_model
from edgeprune.tiling import Size

Sizes = Iterator[tuple[str, tuple[int, ...]]]

IMAGE = Size(672, 672)  # 576 visual tokens
PATCH, FRAMES, MERGE, WINDOW = 14, 2, 2, 112
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>
{%- else %}{{ part.text }}{% endif -%}
{%- endfor -%}
{%- endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}
"""


@dataclass(frozen=True)
class QwenShape:
    """Sizes of a decoder and of the vision tower before it."""

    layers: int
    width: int
    mlp: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False
    positions: int = 32768
    windowed: bool = False  # Qwen2.5-VL
    blocks: int = 32
    vision_width: int = 1280
    vision_mlp: int = 5120
    vision_heads: int = 16
    full: tuple[int, ...] = (7, 15, 23, 31)  # Qwen2.5-VL: blocks with full attention
    size: Size | None = None  # of images; None: the family's default
    awq: bool = False  # the decoder's products are quantised; sparse only

    def write(self, folder: Path, *, sparse: bool = True) -> Path:
        """A checkpoint in the published layout, its weights a hole in a file."""
        return write(self, folder, sparse=sparse)

    def open(self, folder: Path) -> Adapter:
        """The checkpoint, frozen for images of this size."""
        return open_model(str(folder), size=self.size)


QWEN25 = QwenShape(
    28,
    3584,
    18944,
    28,
    4,
    152064,
    positions=128000,
    windowed=True,
    vision_mlp=3420,
    size=IMAGE,
)
SHAPES = {
    "qwen2-vl-2b": QwenShape(28, 1536, 8960, 12, 2, 151936, tied=True, size=IMAGE),
    "qwen2-vl-7b": QwenShape(28, 3584, 18944, 28, 4, 152064, size=IMAGE),
    "qwen2.5-vl-7b": QWEN25,
    "qwen2.5-vl-7b-awq": replace(QWEN25, awq=True),
}


def write(
    shape: QwenShape,
    folder: Path,
    *,
    sparse: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
    shard_bytes: int = SHARD,
) -> Path:
    """Write a checkpoint that transformers loads: random, or (sparse) zeros that take no disk."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = write_tokenizer(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    config = _config(shape, tokens, str(dtype).removeprefix("torch."))
    if shape.awq:
        config["quantization_config"] = AWQ
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "preprocessor_config.json").write_text(json.dumps(_preprocessor(shape)))
    tensors = dict(_tensors(shape))
    if sparse:
        tensors, words = packed(tensors) if shape.awq else (tensors, set[str]())
        write_sparse(tensors, folder, words=words)
    else:
        write_random(tensors, folder, seed, dtype, shard_bytes)
    return folder


def write_tokenizer(folder: Path) -> dict[str, int]:
    """Bytes as tokens, and the special ones; their ids."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return {token: len(letters) + i for i, token in enumerate(SPECIAL)}


def _config(shape: QwenShape, tokens: dict[str, int], dtype: str) -> dict[str, Any]:
    head = shape.width // shape.heads // 2  # pairs
    return {
        "architectures": [f"Qwen2{'_5_' if shape.windowed else ''}VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl" if shape.windowed else "qwen2_vl",
        "hidden_act": "silu",
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.positions,
        "max_window_layers": shape.layers,
        "sliding_window": shape.positions,
        "use_sliding_window": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [head // 4, *[3 * head // 8] * 2]},
        "tie_word_embeddings": shape.tied,
        "torch_dtype": dtype,
        "bos_token_id": tokens["<|endoftext|>"],
        "eos_token_id": tokens["<|im_end|>"],
        "vision_start_token_id": tokens["<|vision_start|>"],
        "vision_end_token_id": tokens["<|vision_end|>"],
        "image_token_id": tokens["<|image_pad|>"],
        "video_token_id": tokens["<|video_pad|>"],
        "vision_config": _vision_config(shape),
    }


def _vision_config(shape: QwenShape) -> dict[str, Any]:
    common = {
        "depth": shape.blocks,
        "num_heads": shape.vision_heads,
        "in_chans": 3,
        "patch_size": PATCH,
        "spatial_patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": FRAMES,
    }
    if not shape.windowed:
        ratio = shape.vision_mlp // shape.vision_width
        own = {"embed_dim": shape.vision_width, "hidden_size": shape.width, "mlp_ratio": ratio}
        return {**common, **own, "hidden_act": "quick_gelu"}
    return {
        **common,
        "hidden_act": "silu",
        "hidden_size": shape.vision_width,
        "intermediate_size": shape.vision_mlp,
        "out_hidden_size": shape.width,
        "window_size": WINDOW,
        "fullatt_block_indexes": list(shape.full),
        "tokens_per_second": 2,
    }


def _preprocessor(shape: QwenShape) -> dict[str, Any]:
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": f"Qwen2{'_5_' if shape.windowed else ''}VLProcessor",
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": PATCH,
        "temporal_patch_size": FRAMES,
        "merge_size": MERGE,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


def _tensors(shape: QwenShape) -> Sizes:
    """Names and shapes as the published checkpoints store them."""
    width, kv = shape.width, shape.width // shape.heads * shape.kv_heads
    yield "model.embed_tokens.weight", (shape.vocabulary, width)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocabulary, width)
    yield "model.norm.weight", (width,)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        for name, size in (("q", width), ("k", kv), ("v", kv)):
            yield from linear(f"{prefix}self_attn.{name}_proj", size, width)
        yield f"{prefix}self_attn.o_proj.weight", (width, width)
        for name in ("gate", "up"):
            yield f"{prefix}mlp.{name}_proj.weight", (shape.mlp, width)
        yield f"{prefix}mlp.down_proj.weight", (width, shape.mlp)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{name}.weight", (width,)
    yield from _vision_tensors(shape)


def _vision_tensors(shape: QwenShape) -> Sizes:
    width, mlp, joined = shape.vision_width, shape.vision_mlp, MERGE**2 * shape.vision_width
    yield "visual.patch_embed.proj.weight", (width, 3, FRAMES, PATCH, PATCH)
    names = {"gate_proj": mlp, "up_proj": mlp} if shape.windowed else {"fc1": mlp}
    for block in range(shape.blocks):
        prefix = f"visual.blocks.{block}."
        for name in ("norm1", "norm2"):
            yield from norm(f"{prefix}{name}", width, bias=not shape.windowed)
        yield from linear(f"{prefix}attn.qkv", 3 * width, width)
        yield from linear(f"{prefix}attn.proj", width, width)
        for name, size in names.items():
            yield from linear(f"{prefix}mlp.{name}", size, width)
        yield from linear(f"{prefix}mlp.{'down_proj' if shape.windowed else 'fc2'}", width, mlp)
    yield from norm("visual.merger.ln_q", width, bias=not shape.windowed)
    yield from linear("visual.merger.mlp.0", joined, joined)
    yield from linear("visual.merger.mlp.2", shape.width, joined)


def linear(name: str, outputs: int, inputs: int) -> Sizes:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def norm(name: str, width: int, *, bias: bool) -> Sizes:
    yield f"{name}.weight", (width,)
    if bias:
        yield f"{name}.bias", (width,)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a Qwen-VL checkpoint of a real size.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sparse", action="store_true", help="zeros that take no disk")
    args = parser.parse_args()
    print(write(SHAPES[args.shape], args.folder, sparse=args.sparse))


if __name__ == "__main__":
    main()
