"""A decoder layer with a short convolution in place of attention (LFM2).

A token reads itself and the few tokens before it, channel by channel, between two gates. What the
next call needs of this one is the end of the convolution's input, `kernel` - 1 tokens: the layer's
state. Where tokens were dropped before the layer, the tokens that are left are each other's
neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgeprune.models._decoder_config import DecoderConfig, LayerConfig
from edgeprune.models._decoder_layer import MLP, Cache, Rotary
from edgeprune.models._layers import Linear, Narrow, Product, RMSNorm, Sum
from edgeprune.models._ops import Together, TorchOps, cast
from edgeprune.policies._signals import AttentionStates, Segments


class Convolution(nn.Module):
    """y = W_out (C * conv(B * u)), where B, C and u are thirds of W_in x."""

    def __init__(self, config: DecoderConfig, layer: LayerConfig, ops: TorchOps) -> None:
        super().__init__()
        width, bias = config.width, layer.output_bias
        self.input = Narrow(width, 3 * width, ops, bias)
        self.weight = nn.Parameter(torch.empty(width, layer.kernel))  # the token itself last
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.before, self.behind = Product(), Product()
        self.output = Linear(width, width, ops, bias)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Normed tokens [n, S, width] and the state [n, kernel - 1, width] -> the branch, and the
        state after them."""
        gate_in, gate_out, u = self.input(x).chunk(3, dim=-1)
        mixed, state = convolved(self.before(gate_in, u), state, self.weight)
        if self.bias is not None:
            mixed = mixed + self.bias
        return self.output(self.behind(gate_out, mixed)), state


def convolved(x: Tensor, state: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [n, S, channels] through a causal convolution of `weight` [channels, kernel], whose
    tokens before are the state [n, kernel - 1, channels], and the state after them.

    The convolution is written as products and sums, whose order of axes is that of the tokens: no
    engine has to transpose, and all have the operators.
    """
    inputs = torch.cat([state, cast(x, state.dtype)], dim=1)
    count, kernel = x.shape[1], weight.shape[1]
    mixed = inputs.narrow(1, 0, count) * weight[:, 0]
    for tap in range(1, kernel):
        mixed = mixed + inputs.narrow(1, tap, count) * weight[:, tap]
    return mixed, inputs.narrow(1, count, kernel - 1)


def begun(cache: Cache) -> tuple[Tensor, ...]:
    """The states before a call: zeros before a dialogue's first, whatever lies in their memory."""
    return tuple(
        torch.where(cache.start.view([1] * past.dim()) > 0, past, torch.zeros_like(past))
        for past in cache.kept
    )


class ConvolutionLayer(nn.Module):
    def __init__(self, config: DecoderConfig, layer: LayerConfig, ops: TorchOps) -> None:
        super().__init__()
        norm = config.width, config.eps, ops
        self.convolution_norm, self.mlp_norm = RMSNorm(*norm), RMSNorm(*norm)
        self.convolution = Convolution(config, layer, ops)
        self.mlp = MLP(config, layer, ops)
        self.residual = Sum()

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        rotary: Rotary,
        cache: Cache,
        segments: Segments,
        together: Together | None = None,
    ) -> tuple[Tensor, Cache, AttentionStates | None]:
        """As `DecoderLayer`; there is no attention to look at."""
        (held,) = begun(cache)
        branch, state = self.convolution(self.convolution_norm(hidden), held)
        hidden = self.residual(hidden, branch)
        hidden = self.residual(hidden, self.mlp(self.mlp_norm(hidden)))
        return hidden, Cache((state,), cache.start, cache.end), None
