"""A vision transformer whose patches become fewer tokens by attention (Qwen-VL, arXiv 2308.12966).

Learned queries attend to all patches, whatever the image shows. So a token is no patch: what it
stands for are the patches that it attends to, weighted by how much. Positions of patches are
learned, or sines and cosines, for a square grid and resized to the image's, bicubically.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune.errors import SpecError
from edgeprune.models._encoder import Encoder, EncoderConfig
from edgeprune.models._encoder_site import SiteConfig
from edgeprune.models._layers import LayerNorm, Linear, Narrow, Scores, join_heads, split_heads
from edgeprune.models._ops import TorchOps, cast
from edgeprune.models._vision_tower import Encoded, Encoding


@dataclass(frozen=True, slots=True)
class ResampledConfig(EncoderConfig):
    """Sizes of the tower and of the queries behind it."""

    table: int = 16  # positions a side of the learned grid
    queries: int = 16  # a side: there are their square
    resampled: int = 0  # channels of a token
    resampled_heads: int = 1

    @property
    def merging_blocks(self) -> int:
        return 0

    @property
    def features(self) -> int:
        return self.resampled

    def build(self, ops: TorchOps, site: SiteConfig | None = None) -> ResampledEncoder:
        if site is not None:
            raise SpecError(
                "--encoder is not for this model: its tokens are made of all patches at once; leave"
                " it out"
            )
        return ResampledEncoder(self, ops)


class ResampledEncoder(Encoder):
    """Pixels [tiles, 3, H, W] to tokens [tiles, queries, channels]; queries and keys are those of
    the cross-attention."""

    def __init__(self, config: ResampledConfig, ops: TorchOps) -> None:
        super().__init__(config, ops)
        self.sides = config.table, config.side
        self.position = nn.Parameter(torch.empty(config.table**2, config.width))
        self.resampler = Resampler(config, ops)

    def positions(self) -> Tensor:
        return resized(self.position, *self.sides)

    def leave(self, seen: Encoding) -> Encoded:
        features, query, key = self.resampler(super().leave(seen).features)
        return Encoded(features, None, query, key, resampled=True)


class Resampler(nn.Module):
    """Cross-attention of learned queries to patches; values have no positions."""

    def __init__(self, config: ResampledConfig, ops: TorchOps) -> None:
        super().__init__()
        count, width, norm = config.queries**2, config.resampled, (config.resampled, 1e-6, ops)
        self.heads, self.sides = config.resampled_heads, (config.queries, config.side)
        self.queries = nn.Parameter(torch.empty(count, width))
        self.position = nn.Parameter(torch.empty(count, width))
        self.project = Linear(config.width, width, ops)
        self.query_norm, self.key_norm = LayerNorm(*norm), LayerNorm(*norm)
        self.query = Narrow(width, width, ops, bias=True)
        self.key = Narrow(width, width, ops, bias=True)
        self.value = Narrow(width, width, ops, bias=True)
        self.scores = Scores(ops)
        self.output = Linear(width, width, ops, bias=True)

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[tiles, n, width] -> tokens [tiles, queries, channels], query and key by head."""
        patches = self.key_norm(self.project(patches))
        asked = self.query_norm(self.queries[None]) + self.position
        query = split_heads(self.query(asked), self.heads).expand(patches.shape[0], -1, -1, -1)
        placed = patches + resized(self.position, *self.sides)
        key, value = (
            split_heads(part(x), self.heads)
            for part, x in ((self.key, placed), (self.value, patches))
        )
        return self.output(join_heads(self.scores(query, key, value))), query, key


def resized(table: Tensor, side: int, wanted: int) -> Tensor:
    """A square grid of vectors [side^2, width] as [wanted^2, width], in its dtype, bicubically:
    rows, then columns, each by a product with constants, in float32."""
    if side == wanted:
        return table
    weights, width = bicubic(side, wanted), table.shape[1]
    rows = weights @ cast(table, torch.float32).view(side, side * width)
    found = weights @ rows.view(wanted, side, width)
    return cast(found.reshape(wanted * wanted, width), table.dtype)


def bicubic(side: int, wanted: int) -> Tensor:
    """What each of `wanted` points has of `side` points of a line: float32 [wanted, side]."""
    with torch.device("cpu"), torch.no_grad():
        points = torch.eye(side)[None, :, :, None]
        line = F.interpolate(points, size=(wanted, 1), mode="bicubic", align_corners=False)
    return line[0, :, :, 0].T.contiguous()
