"""Vision tower and projector in training: CLIP's architecture under transformers' names.

The modules compute what CLIPVisionModel and LLaVA's projector compute, with float32 residuals and
matrix products in `dtype`. Their state goes into a LLaVA checkpoint as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.scenes576.scenes import GRID, PATCH, SIZE
from benchmarks.scenes576.symbols import place_waves

MEAN, STD = 0.5, 0.25  # of a pixel's value, 0 to 1, as the processor normalises it


@dataclass(frozen=True)
class TowerShape:
    """Sizes of the tower; the features are those before the last layer, as LLaVA-1.5 takes them."""

    width: int = 192
    layers: int = 7
    heads: int = 6
    hidden: int = 768


class _Layer(nn.Module):
    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        width = shape.width
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn = nn.ModuleDict(
            {name: nn.Linear(width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        )
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, shape.hidden), "fc2": nn.Linear(shape.hidden, width)}
        )


class Tower(nn.Module):
    """The vision tower; `forward` gives states before and after the last layer."""

    def __init__(self, shape: TowerShape, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.shape, width = shape, shape.width
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(torch.randn(width) * 0.02)
        self.embeddings.patch_embedding = nn.Conv2d(3, width, PATCH, PATCH, bias=False)
        self.embeddings.position_embedding = nn.Embedding(GRID * GRID + 1, width)
        with torch.no_grad():  # places are known from the start; the first row is [CLS]'s
            waves = place_waves(GRID)
            directions = torch.randn(waves.shape[1], width) * 0.4 / waves.norm(dim=1).mean()
            self.embeddings.position_embedding.weight[1:] = waves @ directions
        self.pre_layrnorm = nn.LayerNorm(width)  # transformers' spelling
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList([_Layer(shape) for _ in range(shape.layers)])
        self.post_layernorm = nn.LayerNorm(width)
        for name, p in self.named_parameters():
            if p.ndim == 2 and "layers." in name:
                nn.init.normal_(p, std=p.shape[1] ** -0.5)
                if name.split(".")[-2] in ("out_proj", "fc2"):  # a layer starts as the identity
                    nn.init.zeros_(p)

    def forward(self, images: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """States float32 [batch, 1 + patches, width] of uint8 images [batch, SIZE, SIZE, 3]."""
        n = len(images)
        tiles = images.view(n, GRID, PATCH, GRID, PATCH, 3).permute(0, 1, 3, 5, 2, 4)
        pixels = (tiles.reshape(n, GRID * GRID, -1).to(dtype) / 255 - MEAN) / STD
        weight = self.embeddings.patch_embedding.weight.flatten(1)
        patches = F.linear(pixels, weight.to(dtype)).float()
        cls = self.embeddings.class_embedding.expand(n, 1, -1)
        x = torch.cat([cls, patches], 1) + self.embeddings.position_embedding.weight
        before = x = self.pre_layrnorm(x)
        for layer in self.encoder.layers:
            before, x = x, self._layer(layer, x, dtype)
        return before, x

    def _layer(self, layer: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        y = layer.layer_norm1(x).to(dtype)
        a = layer.self_attn
        q, k, v = (
            _linear(a[name], y).view(*y.shape[:2], self.shape.heads, -1).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + _linear(a["out_proj"], y)
        y = _linear(layer.mlp["fc1"], layer.layer_norm2(x).to(dtype))
        return x + _linear(layer.mlp["fc2"], y * torch.sigmoid(1.702 * y))


class Projector(nn.Module):
    """LLaVA-1.5's two layers from features to the decoder's width."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(width, out), nn.Linear(out, out)

    def forward(self, features: Tensor, dtype: torch.dtype) -> Tensor:
        """Visual tokens float32 [batch, patches, out] of features [batch, patches, width]."""
        return _linear(self.linear_2, F.gelu(_linear(self.linear_1, features.to(dtype)))).float()


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


class Sight(nn.Module):
    """Tower and projector, named as in a LLaVA checkpoint."""

    def __init__(self, shape: TowerShape, out: int, seed: int = 0) -> None:
        super().__init__()
        self.vision_tower = Tower(shape, seed)
        self.multi_modal_projector = Projector(shape.width, out)

    def forward(self, images: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Visual tokens [batch, patches, out]; [CLS] before the last layer; [CLS] pooled."""
        before, last = self.vision_tower(images, dtype)
        tokens = self.multi_modal_projector(before[:, 1:], dtype)
        return tokens, before[:, 0], self.vision_tower.post_layernorm(last[:, 0])

    def state(self) -> dict[str, Tensor]:
        """All weights in float16 on the CPU."""
        return {k: v.detach().to("cpu", torch.float16).contiguous()
                for k, v in self.state_dict().items()}  # fmt: skip


def vision_config(shape: TowerShape) -> dict[str, Any]:
    """Settings of transformers' CLIPVisionConfig."""
    return {
        "hidden_size": shape.width,
        "intermediate_size": shape.hidden,
        "projection_dim": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "image_size": SIZE,
        "patch_size": PATCH,
        "hidden_act": "quick_gelu",
    }
