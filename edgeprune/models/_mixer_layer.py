"""A decoder layer that mixes tokens by states of a fixed size, in place of attention over a cache.

The mixer is a short convolution, or linear attention. Where tokens were dropped before the layer,
the mixer sees the others alone, as each other's neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgeprune.models._decoder_config import DecoderConfig, LayerConfig
from edgeprune.models._decoder_layer import MLP, Cache, Rotary
from edgeprune.models._layers import RMSNorm, Sum
from edgeprune.models._ops import Bidirectional, TorchOps
from edgeprune.policies._signals import AttentionStates, Segments


class MixerLayer(nn.Module):
    """`mixer`: normed tokens [n, S, width] and the states before a call -> the branch, and the
    states after it. Parameters of the mixer and of its norm are named after `kind`."""

    def __init__(
        self, kind: str, mixer: nn.Module, config: DecoderConfig, layer: LayerConfig, ops: TorchOps
    ) -> None:
        super().__init__()
        self.kind, norm = kind, (config.width, config.eps, ops)
        self.add_module(f"{kind}_norm", RMSNorm(*norm))
        self.mlp_norm = RMSNorm(*norm)
        self.add_module(kind, mixer)
        self.mlp = MLP(config, layer, ops)
        self.residual = Sum()

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        rotary: Rotary,
        cache: Cache,
        segments: Segments,
        bidirectional: Bidirectional | None = None,
    ) -> tuple[Tensor, Cache, AttentionStates | None]:
        """As `DecoderLayer`; there is no attention to look at."""
        mixer, norm = self.get_submodule(self.kind), self.get_submodule(f"{self.kind}_norm")
        branch, *states = mixer(norm(hidden), *begun(cache))
        hidden = self.residual(hidden, branch)
        hidden = self.residual(hidden, self.mlp(self.mlp_norm(hidden)))
        return hidden, Cache(tuple(states), cache.start, cache.end), None


def begun(cache: Cache) -> tuple[Tensor, ...]:
    """The states before a call: zeros before a dialogue's first, whatever lies in their memory."""
    return tuple(
        torch.where(cache.start.view([1] * past.dim()) > 0, past, torch.zeros_like(past))
        for past in cache.kept
    )
