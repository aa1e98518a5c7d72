"""The projector of CogVLM and of GLM-4V: a linear layer, a norm, then a gated MLP."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune.models._layers import LayerNorm, Linear, Product
from edgeprune.models._ops import TorchOps, cast


@dataclass(frozen=True, slots=True)
class Glu:
    """From the tower's width to the decoder's; with `merged`, 2 x 2 patches become one of that
    width first, by a convolution."""

    width: int  # of a patch
    inner: int
    output: int
    merged: int = 0

    def build(self, ops: TorchOps) -> nn.Module:
        return _Glu(self, ops)


class _Glu(nn.Module):
    def __init__(self, config: Glu, ops: TorchOps) -> None:
        super().__init__()
        self.merge = nn.Conv2d(config.width, config.merged, 2, 2) if config.merged else None
        self.first = Linear(config.merged or config.width, config.output, ops)
        self.norm = LayerNorm(config.output, 1e-5, ops)
        self.gate = Linear(config.output, config.inner, ops)
        self.up = Linear(config.output, config.inner, ops)
        self.product = Product()
        self.down = Linear(config.inner, config.output, ops)

    def forward(self, features: Tensor) -> Tensor:
        """Features [1, n, width], with `merged` of 4 patches side by side, to [1, n, output]."""
        if self.merge is not None:
            features = _merged(features, self.merge)
        hidden = F.gelu(self.norm(self.first(features)))
        found = self.down(self.product(F.silu(self.gate(hidden)), self.up(hidden)))
        return cast(found, self.down.weight.dtype)


def _merged(features: Tensor, convolution: nn.Conv2d) -> Tensor:
    """The convolution at each group of 2 x 2 patches that is left: [1, n, 4 * width] ->
    [1, n, merged]."""
    count, width = features.shape[1], convolution.in_channels
    groups = cast(features, convolution.weight.dtype).view(count, 4, width).transpose(1, 2)
    found: Tensor = convolution(groups.reshape(count, width, 2, 2))
    return found.reshape(1, count, convolution.out_channels)
