"""Random-weight LLaVA checkpoints of real sizes, so that speed is measured where it matters.

python -m benchmarks.shapes 12x1024 checkpoints/12x1024
python -m benchmarks.shapes 7b checkpoints/7b --sparse     # zeros that take no disk
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import struct
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.shape import PATCH, Shape
from edgeprune.demo import MODEL_DIR

Sizes = dict[str, tuple[int, ...]]

SHARD = 2 << 30  # bytes


SHAPES = {
    "12x1024": Shape(12, 1024, 2816, 16, 16, 8192),
    "12x1024-clip": Shape(12, 1024, 2816, 16, 16, 8192, vision_layers=24, vision_width=1024),
    "0.5b": Shape(24, 896, 4864, 14, 2, 8192, bias=True),  # Qwen2-0.5B's decoder
    "7b": Shape(32, 4096, 11008, 32, 32, 32064, vision_layers=24, vision_width=1024),
    "13b": Shape(40, 5120, 13824, 40, 40, 32064, vision_layers=24, vision_width=1024),
}


def write(shape: Shape, folder: Path, *, sparse: bool = False, seed: int = 0) -> Path:
    """Write a checkpoint that transformers loads: fp16, random or (sparse) all zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_configs(shape, folder)
    tensors = dict(_tensors(shape))
    if sparse:
        write_sparse(tensors, folder)
    else:
        write_random(tensors, folder, seed)
    return folder


def _write_configs(shape: Shape, folder: Path) -> None:
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(MODEL_DIR / name, folder / name)
    tokenizer = json.loads((MODEL_DIR / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]  # every token has a word, so that every answer has text
    words.update({f"w{token}": token for token in range(len(words), shape.vocabulary)})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    processor = json.loads((MODEL_DIR / "processor_config.json").read_text())
    side = {"height": shape.image, "width": shape.image}
    processor["image_processor"].update(size={"shortest_edge": shape.image}, crop_size=side)
    (folder / "processor_config.json").write_text(json.dumps(processor))
    config = json.loads((MODEL_DIR / "config.json").read_text())
    config["image_seq_length"] = shape.patches
    config["text_config"].update(_text_config(shape))
    config["vision_config"].update(
        hidden_size=shape.vision_width,
        intermediate_size=4 * shape.vision_width,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_width // 64,
        image_size=shape.image,
        patch_size=PATCH,
    )
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def _text_config(shape: Shape) -> dict[str, Any]:
    return {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.width // shape.heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 4096,
        "attention_bias": shape.bias,
    }


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes as LLaVA checkpoints store them."""
    width, kv = shape.width, shape.width // shape.heads * shape.kv_heads
    yield "language_model.model.embed_tokens.weight", (shape.vocabulary, width)
    yield "language_model.lm_head.weight", (shape.vocabulary, width)
    yield "language_model.model.norm.weight", (width,)
    for layer in range(shape.layers):
        prefix = f"language_model.model.layers.{layer}."
        outputs = {"q": (width, width), "k": (kv, width), "v": (kv, width), "o": (width, width)}
        for name, size in outputs.items():
            yield f"{prefix}self_attn.{name}_proj.weight", size
            if shape.bias:
                yield f"{prefix}self_attn.{name}_proj.bias", size[:1]
        for name in ("gate", "up"):
            yield f"{prefix}mlp.{name}_proj.weight", (shape.mlp, width)
        yield f"{prefix}mlp.down_proj.weight", (width, shape.mlp)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{name}.weight", (width,)
    yield from _vision_tensors(shape)


def _vision_tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, prefix = shape.vision_width, "vision_tower.vision_model."
    yield f"{prefix}embeddings.class_embedding", (width,)
    yield f"{prefix}embeddings.patch_embedding.weight", (width, 3, PATCH, PATCH)
    yield f"{prefix}embeddings.position_embedding.weight", (shape.patches + 1, width)
    for norm in ("pre_layrnorm", "post_layernorm"):
        yield f"{prefix}{norm}.weight", (width,)
        yield f"{prefix}{norm}.bias", (width,)
    for layer in range(shape.vision_layers):
        block = f"{prefix}encoder.layers.{layer}."
        sizes = {
            f"self_attn.{n}": (width, width) for n in ("q_proj", "k_proj", "v_proj", "out_proj")
        }
        sizes |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        for name, size in sizes.items():
            yield f"{block}{name}.weight", size
            yield f"{block}{name}.bias", size[:1]
        for norm in ("layer_norm1", "layer_norm2"):
            yield f"{block}{norm}.weight", (width,)
            yield f"{block}{norm}.bias", (width,)
    for number, inputs in ((1, width), (2, shape.width)):
        yield f"multi_modal_projector.linear_{number}.weight", (shape.width, inputs)
        yield f"multi_modal_projector.linear_{number}.bias", (shape.width,)


def _random(name: str, size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if "norm" in name and name.endswith("weight"):
        return torch.ones(size)
    scale = 0.02 if len(size) < 2 else 1 / math.sqrt(math.prod(size[1:]))
    return torch.randn(size, generator=generator) * scale


def write_random(
    tensors: Sizes,
    folder: Path,
    seed: int,
    dtype: torch.dtype = torch.float16,
    shard_bytes: int = SHARD,
) -> None:
    """Weights of about unit gain in numbered shards of at most so many bytes, with their index."""
    generator = torch.Generator().manual_seed(seed)
    for file, shard in _shards(tensors, folder, shard_bytes):
        weights = {n: _random(n, size, generator).to(dtype) for n, size in shard.items()}
        save_file(weights, file, metadata={"format": "pt"})


def write_sparse(
    tensors: Sizes, folder: Path, shard_bytes: int = SHARD, words: Collection[str] = ()
) -> None:
    """Shards whose data is a hole: it reads as zeros and takes no disk. Tensors of these names are
    int32, all others float16."""
    for file, shard in _shards(tensors, folder, shard_bytes):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, size in shard.items():
            dtype, width = ("I32", 4) if name in words else ("F16", 2)
            end = offset + width * math.prod(size)
            header[name] = {"dtype": dtype, "shape": list(size), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with file.open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + offset)


def _shards(tensors: Sizes, folder: Path, most: int) -> Iterator[tuple[Path, Sizes]]:
    """Files of at most so many bytes, two a number, and what goes into each; writes the index."""
    shards: list[Sizes] = [{}]
    filled = 0
    for name, size in tensors.items():
        if filled and filled + 2 * math.prod(size) > most:
            shards.append({})
            filled = 0
        shards[-1][name] = size
        filled += 2 * math.prod(size)
    names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    index = {tensor: file for file, shard in zip(names, shards, strict=True) for tensor in shard}
    table = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))
    return ((folder / file, shard) for file, shard in zip(names, shards, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a random-weight checkpoint.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sparse", action="store_true", help="zeros that take no disk")
    args = parser.parse_args()
    print(write(SHAPES[args.shape], args.folder, sparse=args.sparse))


if __name__ == "__main__":
    main()
