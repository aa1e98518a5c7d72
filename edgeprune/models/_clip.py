"""The CLIP vision tower, its projector, and what a policy prunes between the two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune.models._layers import Linear, join_heads, split_heads
from edgeprune.models._ops import TorchOps
from edgeprune.policies import Policy
from edgeprune.policies._signals import InputSignals, VisionSignals
from edgeprune.spec import Plan

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """Sizes of a CLIP vision tower, cut after the block that the projector reads."""

    blocks: int  # that are run: the tower's, less those after the chosen hidden state
    width: int
    mlp_width: int
    heads: int
    image: int  # pixels a side
    patch: int
    eps: float
    activation: str
    projector_activation: str
    projector_bias: bool
    output: int  # the decoder's width

    @property
    def grid(self) -> tuple[int, int]:
        side = self.image // self.patch
        return side, side


class Block(nn.Module):
    def __init__(self, config: VisionConfig, ops: TorchOps) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        width = config.width
        self.attention_norm = nn.LayerNorm(width, config.eps)
        self.query = Linear(width, width, bias=True)
        self.key = Linear(width, width, bias=True)
        self.value = Linear(width, width, bias=True)
        self.output = Linear(width, width, bias=True)
        self.mlp_norm = nn.LayerNorm(width, config.eps)
        self.up = Linear(width, config.mlp_width, bias=True)
        self.down = Linear(config.mlp_width, width, bias=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output [1, 1 + N, width], query and key [1, heads, 1 + N, head]."""
        normed, heads = self.attention_norm(x), self.config.heads
        query, key = split_heads(self.query(normed), heads), split_heads(self.key(normed), heads)
        value = split_heads(self.value(normed), heads)
        x = x + self.output(join_heads(self.ops.attend_all(query, key, value)))
        activation = ACTIVATIONS[self.config.activation]
        x = x + self.down(activation(self.up(self.mlp_norm(x))))
        return x, query, key


class Vision(nn.Module):
    """Pixels to visual tokens: encoder, pruning before the decoder, projector."""

    def __init__(
        self, config: VisionConfig, policy: Policy, plan: Plan, ops: TorchOps | None = None
    ) -> None:
        super().__init__()
        ops = ops or TorchOps()
        self.config, self.policy, self.plan = config, policy, plan
        patches = config.grid[0] * config.grid[1]
        self.cls = nn.Parameter(torch.empty(config.width))
        self.patch = nn.Conv2d(3, config.width, config.patch, config.patch, bias=False)
        self.position = nn.Parameter(torch.empty(1 + patches, config.width))
        self.pre_norm = nn.LayerNorm(config.width, config.eps)
        self.blocks = nn.ModuleList(Block(config, ops) for _ in range(config.blocks))
        self.first = Linear(config.width, config.output, config.projector_bias)
        self.second = Linear(config.output, config.output, config.projector_bias)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [1, 3, H, W] -> visual tokens [1, r_1, output], their positions int64 [r_1]."""
        features, query, key = self.encode(pixels)
        kept = torch.arange(features.shape[1], device=features.device)
        stages = self.plan.before_decoder()
        for stage in (s for s in stages if s.site == "vision"):
            signals = VisionSignals(features, query, key, self.config.grid)
            kept = self.policy.vision(signals, stage)
            features = features.index_select(1, kept)
        visual = self.project(features)
        for stage in (s for s in stages if s.site == "input"):
            chosen = self.policy.input(InputSignals(visual, visual.shape[1]), stage, stage.keep)
            visual, kept = visual.index_select(1, chosen), kept.index_select(0, chosen)
        return visual, kept

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Patch features [1, N, width], [CLS] dropped, and the last block's query and key."""
        patches = self.patch(pixels).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls[None, None], patches], dim=1) + self.position
        x = self.pre_norm(tokens)
        for block in self.blocks:
            x, query, key = block(x)
        return x[:, 1:], query, key

    def project(self, features: Tensor) -> Tensor:
        activation = ACTIVATIONS[self.config.projector_activation]
        projected: Tensor = self.second(activation(self.first(features)))
        return projected
