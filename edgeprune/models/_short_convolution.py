"""A short convolution in place of attention, as LFM2 has it.

A token reads itself and the few tokens before it, channel by channel, between two gates. What the
next call needs of this one is the end of the convolution's input, `kernel` - 1 tokens: the layer's
state.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgeprune.models._decoder_config import DecoderConfig, LayerConfig
from edgeprune.models._layers import Linear, Narrow, Product
from edgeprune.models._ops import TorchOps, cast


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
