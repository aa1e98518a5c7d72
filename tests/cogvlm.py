"""Tiny random CogVLM checkpoints, and what the model is, in plain torch: one call, no cache.

The published sizes are others, the names are those of the hub. Facts: the authors' modeling file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from tests.originals import PIECES, sentencepiece

WIDTH, INNER, HEADS, TOWER, SIDE, LAYERS = 32, 48, 4, 24, 4, 3
PATCH = 7
ROWS = 3 + 256 + len(PIECES)


@dataclass(frozen=True)
class Cog:
    """A checkpoint: CogVLM, or where `second` CogVLM2."""

    folder: Path
    tokenizer: Path
    tensors: dict[str, Tensor]
    second: bool

    @property
    def kv_heads(self) -> int:
        return 2 if self.second else HEADS


def checkpoint(folder: Path, *, second: bool = False, **config: Any) -> Cog:
    """The checkpoint in a folder, and the tokenizer, which the hub has elsewhere, in another."""
    tokenizer = folder / "vicuna"
    tokenizer.mkdir(parents=True)
    sentencepiece(tokenizer / "tokenizer.model", PIECES)
    kv = WIDTH // 2 if second else WIDTH
    sizes: dict[str, Sequence[int]] = {
        "lm_head.weight": (ROWS, WIDTH),
        "model.embed_tokens.weight": (ROWS, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for expert in ("language", "vision"):
            qkv = f"{at}self_attn.{expert}_expert_query_key_value."
            sizes[qkv + "weight"] = (WIDTH + 2 * kv, WIDTH)
            if second and expert == "vision":
                sizes[qkv + "bias"] = (WIDTH + 2 * kv,)
            sizes[f"{at}self_attn.{expert}_expert_dense.weight"] = (WIDTH, WIDTH)
            for name in ("gate", "up"):
                sizes[f"{at}mlp.{expert}_mlp.{name}_proj.weight"] = (INNER, WIDTH)
            sizes[f"{at}mlp.{expert}_mlp.down_proj.weight"] = (WIDTH, INNER)
        for name in ("input_layernorm", "post_attention_layernorm"):
            sizes[f"{at}{name}.weight"] = (WIDTH,)
        sizes[f"{at}self_attn.rotary_emb.inv_freq"] = (WIDTH // HEADS // 2,)
    sizes |= {f"model.vision.{name}": size for name, size in _vision(second).items()}
    generator = torch.Generator().manual_seed(5)
    tensors = {name: _drawn(name, size, generator) for name, size in sizes.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(_config(second) | config))
    return Cog(folder, tokenizer, tensors, second)


def _vision(second: bool) -> dict[str, Sequence[int]]:
    sizes: dict[str, Sequence[int]] = {
        "boi": (1, 1, WIDTH),
        "eoi": (1, 1, WIDTH),
        "linear_proj.linear_proj.weight": (WIDTH, TOWER),
        "linear_proj.norm1.weight": (WIDTH,),
        "linear_proj.norm1.bias": (WIDTH,),
        "linear_proj.gate_proj.weight": (INNER, WIDTH),
        "linear_proj.dense_h_to_4h.weight": (INNER, WIDTH),
        "linear_proj.dense_4h_to_h.weight": (WIDTH, INNER),
        "patch_embedding.cls_embedding": (1, TOWER),
        "patch_embedding.position_embedding.weight": (SIDE**2 + 1, TOWER),
        "patch_embedding.proj.weight": (TOWER, 3, PATCH, PATCH),
        "patch_embedding.proj.bias": (TOWER,),
    }
    if second:
        sizes |= {"conv.weight": (TOWER, TOWER, 2, 2), "conv.bias": (TOWER,)}
    for block in range(2):
        at = f"transformer.layers.{block}."
        outputs = {
            "attention.query_key_value": (3 * TOWER, TOWER),
            "attention.dense": (TOWER, TOWER),
            "mlp.fc1": (INNER, TOWER),
            "mlp.fc2": (TOWER, INNER),
        }
        for name, size in outputs.items():
            sizes |= {f"{at}{name}.weight": size, f"{at}{name}.bias": size[:1]}
        for name in ("input_layernorm", "post_attention_layernorm"):
            sizes |= {f"{at}{name}.weight": (TOWER,), f"{at}{name}.bias": (TOWER,)}
    return sizes


def _drawn(name: str, size: Sequence[int], generator: torch.Generator) -> Tensor:
    noise = torch.randn(*size, generator=generator)
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.1 * noise
    if name.endswith("bias"):
        return 0.1 * noise
    wide = "embed" in name or name.endswith("oi")
    found = noise if wide else noise * noise[0].numel() ** -0.5
    if name == "lm_head.weight":
        found[2] = 0  # so that no answer ends early
    return found


def _config(second: bool) -> dict[str, Any]:
    own = {"num_multi_query_heads": 2} if second else {}
    return own | {
        "architectures": ["CogVLMForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_cogvlm.CogVLMForCausalLM"},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "max_position_embeddings": 2048,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "rms_norm_eps": 1e-5,
        "template_version": "chat",
        "vocab_size": ROWS,
        "vision_config": {
            "hidden_act": "gelu",
            "hidden_size": TOWER,
            "image_size": SIDE * PATCH,
            "in_channels": 3,
            "intermediate_size": INNER,
            "layer_norm_eps": 1e-6,
            "num_heads": 2,
            "num_hidden_layers": 2,
            "num_positions": SIDE**2 + 1,
            "patch_size": PATCH,
        },
    }


def logits(cog: Cog, pixels: Tensor, text: Sequence[int]) -> Tensor:
    """Of the last of [bos, image, text]: [vocabulary]."""
    weights = cog.tensors
    image = _image(cog, pixels)
    embedded = weights["model.embed_tokens.weight"]
    x = torch.cat([embedded[[1]], image, embedded[list(text)]])
    count = len(image)
    positions = torch.tensor([0, 1, *[2] * (count - 2), *range(3, 4 + len(text))])
    seeing = torch.zeros(len(x), dtype=torch.bool)
    seeing[1:count] = True  # the begin mark and all patches, not the end mark
    for layer in range(LAYERS):
        x = _layer(cog, f"model.layers.{layer}.", x, positions, seeing)
    return _rms(x[-1], weights["model.norm.weight"]) @ weights["lm_head.weight"].T


def _layer(cog: Cog, at: str, x: Tensor, positions: Tensor, seeing: Tensor) -> Tensor:
    weights, size = cog.tensors, WIDTH // HEADS

    def routed(x: Tensor, name: str, middle: str = "_expert_") -> Tensor:
        found = []
        for expert in ("language", "vision"):
            whole = at + name.replace("*", expert + middle)
            bias = weights.get(whole.replace("weight", "bias")) if "weight" in whole else None
            found.append(F.linear(x, weights[whole], bias))
        return torch.where(seeing[:, None], found[1], found[0])

    normed = _rms(x, weights[at + "input_layernorm.weight"])
    mixed = routed(normed, "self_attn.*query_key_value.weight")
    kv = cog.kv_heads * size
    query, key, value = (
        part.view(len(x), -1, size).transpose(0, 1) for part in mixed.split([WIDTH, kv, kv], -1)
    )
    theta = 500_000 if cog.second else 10_000
    query, key = (_turned(part, positions, theta) for part in (query, key))
    key, value = (part.repeat_interleave(HEADS // cog.kv_heads, 0) for part in (key, value))
    causal = torch.full((len(x), len(x)), -torch.inf).triu(1)
    seen = (query @ key.mT * size**-0.5 + causal).softmax(-1) @ value
    x = x + routed(seen.transpose(0, 1).reshape(len(x), -1), "self_attn.*dense.weight")
    normed = _rms(x, weights[at + "post_attention_layernorm.weight"])
    gate, up = (routed(normed, f"mlp.*{n}_proj.weight", "_mlp.") for n in ("gate", "up"))
    return x + routed(F.silu(gate) * up, "mlp.*down_proj.weight", "_mlp.")


def _turned(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    half = x.shape[-1] // 2
    angles = positions[:, None] * theta ** -(torch.arange(half) / half)
    turns = torch.polar(torch.ones_like(angles), angles)
    pairs = torch.complex(x[..., :half].contiguous(), x[..., half:].contiguous()) * turns
    return torch.cat([pairs.real, pairs.imag], -1)


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def _image(cog: Cog, pixels: Tensor) -> Tensor:
    """The marks and the tokens between them: [V + 2, width]."""
    weights = {
        name.removeprefix("model.vision."): tensor
        for name, tensor in cog.tensors.items()
        if name.startswith("model.vision.")
    }

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[name + ".weight"], weights.get(name + ".bias"))

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        scale = weights[name + ".weight"], weights[name + ".bias"]
        return F.layer_norm(x, x.shape[-1:], *scale, eps)

    proj = "patch_embedding.proj"
    patches = F.conv2d(pixels, weights[proj + ".weight"], weights[proj + ".bias"], PATCH)
    x = torch.cat([weights["patch_embedding.cls_embedding"], patches[0].flatten(1).T])
    x = x + weights["patch_embedding.position_embedding.weight"]
    for block in range(2):
        at = f"transformer.layers.{block}."
        mixed = linear(x, at + "attention.query_key_value").view(len(x), 3, 2, -1)
        query, key, value = mixed.permute(1, 2, 0, 3)
        seen = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1) @ value
        branch = linear(seen.transpose(0, 1).reshape(len(x), -1), at + "attention.dense")
        x = x + norm(branch, at + "input_layernorm", 1e-6)
        branch = linear(F.gelu(linear(x, at + "mlp.fc1")), at + "mlp.fc2")
        x = x + norm(branch, at + "post_attention_layernorm", 1e-6)
    x = x[1:]
    if cog.second:
        grid = x.T.reshape(1, TOWER, SIDE, SIDE)
        x = F.conv2d(grid, weights["conv.weight"], weights["conv.bias"], 2)[0].flatten(1).T
    x = F.gelu(norm(linear(x, "linear_proj.linear_proj"), "linear_proj.norm1", 1e-5))
    x = F.silu(linear(x, "linear_proj.gate_proj")) * linear(x, "linear_proj.dense_h_to_4h")
    marks = (weights[name].reshape(1, -1) for name in ("boi", "eoi"))
    begin, end = marks
    return torch.cat([begin, linear(x, "linear_proj.dense_4h_to_h"), end])
