"""Linear attention in place of attention: Gated DeltaNet, as Qwen3.5 has it.

Queries, keys and values go through a short convolution; then the gated delta rule reads and writes
a matrix a head, which is the layer's state beside the convolution's. It is float32 in every graph.
A token that was dropped before the layer never enters either state.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune.models._decoder_config import DecoderConfig, LayerConfig
from edgeprune.models._layers import (
    Linear,
    Narrow,
    Product,
    RMSNorm,
    Unquantised,
    join_heads,
    split_heads,
)
from edgeprune.models._ops import TorchOps
from edgeprune.models._short_convolution import convolved

EPS = 1e-6
"""Beside the squares of a query or key, where these are made unit vectors."""


class GatedDeltaNet(nn.Module):
    """y = W_out (norm(read) * silu(W_gate x)), what is read by the gated delta rule."""

    def __init__(self, config: DecoderConfig, layer: LayerConfig, ops: TorchOps) -> None:
        super().__init__()
        assert layer.linear is not None
        self.sizes, self.ops = layer.linear, ops
        width, sizes = config.width, layer.linear
        self.input = Narrow(width, sizes.channels, ops)  # queries, keys and values
        self.weight = nn.Parameter(torch.empty(sizes.channels, layer.kernel))  # of the convolution
        self.beta, self.decay = (Unquantised(width, sizes.value_heads, ops) for _ in range(2))
        self.decay_bias, self.rate = (
            nn.Parameter(torch.empty(sizes.value_heads)) for _ in range(2)
        )
        self.norm = RMSNorm(sizes.value_size, config.eps, ops)
        self.gate = Linear(width, sizes.inner, ops)
        self.product = Product()
        self.output = Linear(sizes.inner, width, ops)

    def forward(self, x: Tensor, state: Tensor, matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normed tokens [n, S, width], the convolution's state [n, kernel - 1, channels] and that
        of the heads [n, heads, key, value] -> the branch, and both states after the tokens."""
        mixed, state = convolved(self.input(x), state, self.weight)
        query, key, value = self._heads(F.silu(mixed))
        rate = -self.rate.float().exp()
        decay = rate * F.softplus(self.decay(x).float() + self.decay_bias.float())
        tokens = decay.transpose(1, 2), self.beta(x).float().sigmoid().transpose(1, 2)
        read, matrices = self.ops.delta_rule(query, key, value, *tokens, matrices)
        gated = self.product(join_heads(self.norm(read)), F.silu(self.gate(x)))
        return self.output(gated), state, matrices

    def _heads(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [n, S, channels] as the rule takes them, float32: queries and
        keys of length 1, the queries scaled, [n, heads, S, size]."""
        sizes, keys = self.sizes, self.sizes.key_heads * self.sizes.key_size
        parts = torch.split_with_sizes(mixed.float(), [keys, keys, sizes.inner], -1)
        query, key, value = parts
        query, key = (_unit(split_heads(part, sizes.key_heads)) for part in (query, key))
        served = sizes.value_heads // sizes.key_heads
        query, key = (_repeated(part, served) for part in (query, key))
        return query * sizes.key_size**-0.5, key, split_heads(value, sizes.value_heads)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS)


def _repeated(x: Tensor, times: int) -> Tensor:
    """Each head several times, one after the other: [n, h, S, size] -> [n, times * h, S, size]."""
    if times == 1:
        return x
    return x[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2)
