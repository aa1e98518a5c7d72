"""A block of the vision transformers of the Qwen-VL families: attention within windows, and an MLP.

Queries and keys turn by the patch's row and column.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from edgeprune.models._encoder_site import Runs
from edgeprune.models._layers import (
    ACTIVATIONS,
    LayerNorm,
    Linear,
    Narrow,
    Product,
    RMSNorm,
    Scores,
    Sum,
    join_heads,
    split_heads,
)
from edgeprune.models._ops import TorchOps, cast
from edgeprune.models._vision_tower import Attended


class Sizes(Protocol):
    """What a block needs of a tower's description."""

    @property
    def width(self) -> int: ...
    @property
    def mlp_width(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def activation(self) -> str: ...
    @property
    def gated(self) -> bool: ...
    @property
    def bias(self) -> bool: ...
    @property
    def eps(self) -> float: ...


class MLP(nn.Module):
    def __init__(self, config: Sizes, ops: TorchOps) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.up = Linear(config.width, config.mlp_width, ops, config.bias)
        self.down = Linear(config.mlp_width, config.width, ops, config.bias)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down(self.activation(self.up(x)))
        return down


class GatedMLP(MLP):
    def __init__(self, config: Sizes, ops: TorchOps) -> None:
        super().__init__(config, ops)
        self.gate = Linear(config.width, config.mlp_width, ops, config.bias)
        self.product = Product()

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down(self.product(self.activation(self.gate(x)), self.up(x)))
        return down


class Block(nn.Module):
    def __init__(self, config: Sizes, runs: Runs, ops: TorchOps) -> None:
        super().__init__()
        self.config, self.runs, self.ops = config, runs, ops
        self.attention_norm = norm(config, ops)
        self.qkv = Narrow(config.width, 3 * config.width, ops, config.bias)
        self.scores = Scores(ops)
        self.output = Linear(config.width, config.width, ops, config.bias)
        self.mlp_norm = norm(config, ops)
        self.mlp = (GatedMLP if config.gated else MLP)(config, ops)
        self.residual = Sum()

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        left: Tensor | None = None,
        seen: Tensor | None = None,
        attended: Attended | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output [tiles, N, width], query and key of the last run [windows, heads, n, head].

        `left` int64 [tiles, N] are the rows of the rotary tables of what is left, where some left;
        `seen` bool [tiles, 1, N, N] which patches attend to which, where not all of a run do.
        `attended` is given the keys and values of each run.
        """
        qkv, mixed, start = self.qkv(self.attention_norm(x)), list[Tensor](), 0
        for windows, patches in self.runs:
            end = start + windows * patches
            part = qkv if len(self.runs) == 1 else qkv[:, start:end]
            if left is None:
                rows = torch.arange(start, end, device=x.device).view(windows, patches)
                rows = rows.repeat(len(x), 1)
            else:
                rows = left if len(self.runs) == 1 else left[:, start:end]
                rows = rows if windows == 1 else rows.reshape(-1, patches)
            one, query, key = self._attend(part, rows, cos, sin, seen, attended)
            mixed.append(one)
            start = end
        joined = mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=1)
        return self._behind(x, joined), query, key

    def of_some(
        self,
        x: Tensor,
        rows: Tensor,
        cos: Tensor,
        sin: Tensor,
        seen: Tensor | None,
        attended: Attended,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same of n of N patches, which attend to the N keys and values that `attended` gives:
        [1, n, width] -> output [1, n, width], query [1, heads, n, head], key [1, heads, N, head].

        `rows` int64 [1, n] are those of the rotary tables; `seen` bool [1, 1, n, N].
        """
        qkv = self.qkv(self.attention_norm(x))
        mixed, query, key = self._attend(qkv, rows, cos, sin, seen, attended)
        return self._behind(x, mixed), query, key

    def _behind(self, x: Tensor, mixed: Tensor) -> Tensor:
        """What follows the attention of a block."""
        x = self.residual(x, self.output(mixed))
        found: Tensor = self.residual(x, self.mlp(self.mlp_norm(x)))
        return found

    def _attend(
        self,
        qkv: Tensor,
        rows: Tensor,
        cos: Tensor,
        sin: Tensor,
        seen: Tensor | None,
        attended: Attended | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attention within equal windows: [tiles, windows * n, 3 width] -> [tiles, .., width].

        `rows` int64 [tiles * windows, n] are those of the rotary tables.
        """
        tiles, width, heads, ops = qkv.shape[0], self.config.width, self.config.heads, self.ops
        shape = (*rows.shape, width)
        query, key, value = (split_heads(p.reshape(shape), heads) for p in qkv.chunk(3, dim=-1))
        query = ops.rotate(query, cos, sin, rows)
        key = ops.rotate(key, cos, sin, rows)
        if attended is not None:
            key, value = attended(key, value)
        bias = None
        if seen is not None:
            bias = cast(torch.where(seen, 0.0, torch.finfo(query.dtype).min), query.dtype)
        mixed = join_heads(self.scores(query, key, value, bias))
        return mixed.reshape(tiles, -1, width), query, key


def norm(config: Sizes, ops: TorchOps, eps: float | None = None) -> nn.Module:
    """RMS norms stand beside gated MLPs. `eps` in place of the tower's own."""
    kind = RMSNorm if config.gated else LayerNorm
    return kind(config.width, config.eps if eps is None else eps, ops)
