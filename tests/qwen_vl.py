"""Tiny random checkpoints of the first Qwen-VL, and what the model is, in plain torch: one call,
no cache.

The published sizes are others, the names are those of the hub. Facts: the authors' modeling files.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

WIDTH, INNER, HEADS, LAYERS = 256, 64, 4, 2
TOWER, MLP, TOWER_HEADS, BLOCKS = 24, 36, 2, 2
IMAGE, PATCH = 28, 7
MERGES = [b"wh", b"what", b"at", b" c", b"ol", b" col", b"or", b" color"]
RANKS = 256 + len(MERGES)
IMAGE_START = RANKS + 214
ROWS = RANKS + 230


@dataclass(frozen=True)
class QwenVL:
    folder: Path
    tensors: dict[str, Tensor]


def vocabulary(file: Path) -> None:
    """Single bytes first, as in the published file, then what is merged."""
    tokens = [bytes([byte]) for byte in range(256)] + MERGES
    lines = (base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens))
    file.write_bytes(b"\n".join(lines) + b"\n")


def checkpoint(folder: Path, *, pickled: bool = False, **config: Any) -> QwenVL:
    """A chat model; `pickled`: in two files of pickles, as it is published."""
    folder.mkdir(parents=True)
    vocabulary(folder / "qwen.tiktoken")
    generator = torch.Generator().manual_seed(7)
    tensors = {name: _drawn(name, size, generator) for name, size in _sizes().items()}
    if pickled:
        write_pickles(folder, tensors)
    else:
        save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(_config() | config))
    settings = {"chat_format": "chatml", "eos_token_id": RANKS, "max_window_size": 6144}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    code = {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}
    settings = {"tokenizer_class": "QWenTokenizer", "auto_map": code}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return QwenVL(folder, tensors)


def write_pickles(folder: Path, tensors: dict[str, Tensor]) -> None:
    names, table = list(tensors), dict[str, str]()
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, folder / file)
        table |= dict.fromkeys(part, file)
    index = json.dumps({"weight_map": table})
    (folder / "pytorch_model.bin.index.json").write_text(index)


def _sizes() -> dict[str, Sequence[int]]:
    sizes: dict[str, Sequence[int]] = {
        "lm_head.weight": (ROWS, WIDTH),
        "transformer.wte.weight": (ROWS, WIDTH),
        "transformer.ln_f.weight": (WIDTH,),
    }
    for layer in range(LAYERS):
        at = f"transformer.h.{layer}."
        sizes |= {
            at + "attn.c_attn.weight": (3 * WIDTH, WIDTH),
            at + "attn.c_attn.bias": (3 * WIDTH,),
            at + "attn.c_proj.weight": (WIDTH, WIDTH),
            at + "mlp.w1.weight": (INNER, WIDTH),
            at + "mlp.w2.weight": (INNER, WIDTH),
            at + "mlp.c_proj.weight": (WIDTH, INNER),
            at + "ln_1.weight": (WIDTH,),
            at + "ln_2.weight": (WIDTH,),
        }
    vision: dict[str, Sequence[int]] = {
        "conv1.weight": (TOWER, 3, PATCH, PATCH),
        "positional_embedding": (256, TOWER),
        "proj": (WIDTH, WIDTH),
        "attn_pool.query": (256, WIDTH),
        "attn_pool.pos_embed": (256, WIDTH),
        "attn_pool.kv_proj.weight": (WIDTH, TOWER),
        "attn_pool.attn.in_proj_weight": (3 * WIDTH, WIDTH),
        "attn_pool.attn.in_proj_bias": (3 * WIDTH,),
        **_linear("attn_pool.attn.out_proj", WIDTH, WIDTH),
    }
    for name, width in (
        *(("ln_pre", TOWER), ("ln_post", WIDTH)),
        *(("attn_pool.ln_q", WIDTH), ("attn_pool.ln_kv", WIDTH)),
    ):
        vision |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for block in range(BLOCKS):
        at = f"transformer.resblocks.{block}."
        vision |= _linear(at + "attn.in_proj", 3 * TOWER, TOWER)
        vision |= _linear(at + "attn.out_proj", TOWER, TOWER)
        vision |= _linear(at + "mlp.c_fc", MLP, TOWER) | _linear(at + "mlp.c_proj", TOWER, MLP)
        for name in ("ln_1", "ln_2"):
            vision |= {f"{at}{name}.weight": (TOWER,), f"{at}{name}.bias": (TOWER,)}
    return sizes | {f"transformer.visual.{name}": size for name, size in vision.items()}


def _linear(name: str, outputs: int, inputs: int) -> dict[str, Sequence[int]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _drawn(name: str, size: Sequence[int], generator: torch.Generator) -> Tensor:
    noise = torch.randn(*size, generator=generator)
    if ".ln_" in name and name.endswith("weight"):
        return 1 + 0.1 * noise
    if name.endswith("bias"):
        return 0.1 * noise
    wide = any(part in name for part in ("wte", "query", "pos_embed", "positional"))
    found = noise if wide else noise * noise[0].numel() ** -0.5
    if name == "lm_head.weight":
        found[RANKS:] = 0  # no answer ends early
    return found


def _config() -> dict[str, Any]:
    return {
        "model_type": "qwen",
        "architectures": ["QWenLMHeadModel"],
        "hidden_size": WIDTH,
        "intermediate_size": 2 * INNER,
        "kv_channels": WIDTH // HEADS,
        "layer_norm_epsilon": 1e-6,
        "max_position_embeddings": 8192,
        "no_bias": True,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "seq_length": 2048,
        "vocab_size": ROWS,
        "visual": {
            "heads": TOWER_HEADS,
            "image_size": IMAGE,
            "image_start_id": IMAGE_START,
            "layers": BLOCKS,
            "mlp_ratio": MLP / TOWER,
            "output_dim": WIDTH,
            "patch_size": PATCH,
            "width": TOWER,
        },
    }


def logits(model: QwenVL, prefix: Sequence[int], image: Tensor, text: Sequence[int]) -> Tensor:
    """Of the last of [prefix, image, text], the image as `tokens` gives it: [vocabulary]."""
    weights, size = model.tensors, WIDTH // HEADS
    table = weights["transformer.wte.weight"]
    x = torch.cat([table[list(prefix)], image, table[list(text)]])
    angles = torch.arange(len(x))[:, None] * 10_000.0 ** -(torch.arange(size // 2) / (size // 2))
    turns = torch.polar(torch.ones_like(angles), angles)

    def turned(x: Tensor) -> Tensor:
        halves = x[..., : size // 2].contiguous(), x[..., size // 2 :].contiguous()
        pairs = torch.complex(*halves) * turns
        return torch.cat([pairs.real, pairs.imag], -1)

    for layer in range(LAYERS):
        at = f"transformer.h.{layer}."
        normed = _rms(x, weights[at + "ln_1.weight"])
        qkv = weights[at + "attn.c_attn.weight"], weights[at + "attn.c_attn.bias"]
        mixed = F.linear(normed, *qkv)
        query, key, value = mixed.view(len(x), 3, HEADS, size).permute(1, 2, 0, 3)
        causal = torch.full((len(x), len(x)), -torch.inf).triu(1)
        seen = (turned(query) @ turned(key).mT * size**-0.5 + causal).softmax(-1) @ value
        x = x + seen.transpose(0, 1).reshape(len(x), -1) @ weights[at + "attn.c_proj.weight"].T
        normed = _rms(x, weights[at + "ln_2.weight"])
        first, second = (normed @ weights[at + f"mlp.{name}.weight"].T for name in ("w1", "w2"))
        x = x + (first * F.silu(second)) @ weights[at + "mlp.c_proj.weight"].T
    return _rms(x[-1], weights["transformer.ln_f.weight"]) @ weights["lm_head.weight"].T


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def tokens(model: QwenVL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The 256 tokens of an image [256, width], and what each attends to of the patches
    [256, patches], mean over heads."""
    weights = {
        name.removeprefix("transformer.visual."): tensor
        for name, tensor in model.tensors.items()
        if name.startswith("transformer.visual.")
    }

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[name + ".weight"], weights.get(name + ".bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        scale = weights[name + ".weight"], weights[name + ".bias"]
        return F.layer_norm(x, x.shape[-1:], *scale, 1e-6)

    def grid(table: Tensor) -> Tensor:
        square = table.T.reshape(1, -1, 16, 16)
        size = (IMAGE // PATCH,) * 2
        return F.interpolate(square, size, mode="bicubic", align_corners=False)[0].flatten(1).T

    x = F.conv2d(pixels, weights["conv1.weight"], None, PATCH)[0].flatten(1).T
    x = norm(x + grid(weights["positional_embedding"]), "ln_pre")
    for block in range(BLOCKS):
        at = f"transformer.resblocks.{block}."
        mixed = linear(norm(x, at + "ln_1"), at + "attn.in_proj")
        query, key, value = mixed.view(len(x), TOWER_HEADS, 3, -1).permute(2, 1, 0, 3)
        seen = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1) @ value
        x = x + linear(seen.transpose(0, 1).reshape(len(x), -1), at + "attn.out_proj")
        x = x + linear(F.gelu(linear(norm(x, at + "ln_2"), at + "mlp.c_fc")), at + "mlp.c_proj")
    kv = norm(linear(x, "attn_pool.kv_proj"), "attn_pool.ln_kv")
    positions = weights["attn_pool.pos_embed"]
    found, seen = F.multi_head_attention_forward(
        (norm(weights["attn_pool.query"], "attn_pool.ln_q") + positions)[:, None],
        (kv + grid(positions))[:, None],
        kv[:, None],
        WIDTH,
        WIDTH // 128,
        weights["attn_pool.attn.in_proj_weight"],
        weights["attn_pool.attn.in_proj_bias"],
        None,
        None,
        False,
        0.0,
        weights["attn_pool.attn.out_proj.weight"],
        weights["attn_pool.attn.out_proj.bias"],
        training=False,
    )
    assert seen is not None
    return norm(found[:, 0], "ln_post") @ weights["proj"], seen[0]
