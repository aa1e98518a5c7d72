"""Fast training forward passes of the demo model, over the parameters of the transformers model.

They compute what `LlavaForConditionalGeneration` computes, with float32 residuals and bfloat16
matrix products, in blocks that `torch.compile` fuses.  Training alone uses them; evaluation runs
the transformers model itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HALF = torch.bfloat16


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x.to(HALF), weight.to(HALF), None if bias is None else bias.to(HALF))


def _heads(x: Tensor, size: int = 32) -> Tensor:
    """[batch, length, width] to [batch, heads, length, size]."""
    return x.view(x.shape[0], x.shape[1], -1, size).transpose(1, 2)


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    normed: Tensor = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    return normed * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(HALF)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Plain attention; its backward pass is far faster here than that of the fused kernel."""
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask
    mixed: Tensor = scores.softmax(-1).to(HALF) @ v
    return mixed.transpose(1, 2).flatten(2)


@torch.compile(dynamic=False)
def _decoder_block(x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, w: list[Tensor]) -> Tensor:
    y = _rms(x, w[0]).to(HALF)
    q, k, v = (_heads(_linear(y, m)) for m in w[1:4])
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    x = x + _linear(_attend(q, k, v, mask), w[4]).float()
    y = _rms(x, w[5]).to(HALF)
    y = F.silu(_linear(y, w[6]).float()).to(HALF) * _linear(y, w[7])
    return x + _linear(y, w[8]).float()


def decoder(model: Any, embeds: Tensor) -> tuple[Tensor, Tensor]:
    """States half-way and final normed states, float32 [batch, length, width], of the decoder."""
    lm = model.model.language_model
    length, half = embeds.shape[1], 16
    frequencies = 10000.0 ** -(torch.arange(half) / half)
    angles = torch.arange(length)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    mask = torch.full((length, length), -1e9).triu(1)
    x = embeds
    middle = x
    for i, layer in enumerate(lm.layers):
        middle = x if i == len(lm.layers) // 2 else middle
        a, m = layer.self_attn, layer.mlp
        attention = [a.q_proj.weight, a.k_proj.weight, a.v_proj.weight, a.o_proj.weight]
        mlp = [m.gate_proj.weight, m.up_proj.weight, m.down_proj.weight]
        norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        x = _decoder_block(x, mask, cos, sin, [norms[0], *attention, norms[1], *mlp])
    return middle, _rms(x, lm.norm.weight)


@torch.compile(dynamic=False)
def _vision_block(x: Tensor, w: list[Tensor]) -> Tensor:
    width = x.shape[-1:]
    y = F.layer_norm(x, width, w[0], w[1]).to(HALF)
    q, k, v = (_heads(_linear(y, w[i], w[i + 1])) for i in (2, 4, 6))
    x = x + _linear(_attend(q, k, v, None), w[8], w[9]).float()
    y = F.layer_norm(x, width, w[10], w[11]).to(HALF)
    y = _linear(y, w[12], w[13]).float()
    y = y * torch.sigmoid(1.702 * y)
    return x + _linear(y, w[14], w[15]).float()


def _both(module: nn.Module) -> list[Tensor]:
    return [module.weight, module.bias]  # type: ignore[list-item]


def vision(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Penultimate and last hidden states, float32 [batch, 145, width], of normalised pixels."""
    tower = model.model.vision_tower
    patch = tower.embeddings.patch_embedding.weight
    n, side, size = pixels.shape[0], pixels.shape[-1] // patch.shape[-1], patch.shape[-1]
    x = pixels.view(n, 3, side, size, side, size).permute(0, 2, 4, 1, 3, 5)
    x = _linear(x.reshape(n, side * side, -1), patch.flatten(1)).float()
    cls = tower.embeddings.class_embedding.expand(n, 1, -1)
    x = torch.cat([cls, x], 1) + tower.embeddings.position_embedding.weight
    x = tower.pre_layrnorm(x)
    before = x
    for layer in tower.encoder.layers:
        a, m = layer.self_attn, layer.mlp
        parts = (layer.layer_norm1, a.q_proj, a.k_proj, a.v_proj, a.out_proj,
                 layer.layer_norm2, m.fc1, m.fc2)  # fmt: skip
        before, x = x, _vision_block(x, [t for part in parts for t in _both(part)])
    return before, x


def project(model: Any, features: Tensor) -> Tensor:
    """Visual tokens float32 [batch, patches, width] of patch features."""
    p = model.model.multi_modal_projector
    x = F.gelu(_linear(features, *_both(p.linear_1)).float())
    return _linear(x, *_both(p.linear_2)).float()
