"""SigLIP2 for images of any shape: a learned square grid of positions, resampled to the image's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune.models._encoder import Encoder, EncoderConfig
from edgeprune.models._encoder_site import Runs, SiteConfig, Units
from edgeprune.models._layers import Linear
from edgeprune.models._ops import TorchOps, cast


@dataclass(frozen=True, slots=True)
class Siglip2Config(EncoderConfig):
    """`image` is the height of an image in pixels."""

    columns: int = 1  # patches a row
    table: int = 16  # learned positions a side

    @property
    def merging_blocks(self) -> int:
        return 0

    @property
    def patches(self) -> int:
        return self.side * self.columns

    @property
    def size(self) -> tuple[int, int]:
        return self.image, self.columns * self.patch

    def units(self, side: int) -> Units:
        grid = self.side, self.columns
        return Units.of(range(self.patches), grid, side, ((1, self.patches),))

    def windows(self, block: int, site: SiteConfig | None = None) -> Runs:
        kept = site.kept_runs[0][1] if site and block >= site.at else self.patches
        return ((1, kept),)

    def build(self, ops: TorchOps, site: SiteConfig | None = None) -> Siglip2:
        return Siglip2(self, ops, site)


class Siglip2(Encoder):
    """Patches are rows of numbers, as checkpoints store their embedding: pixel by pixel, its three
    colours together."""

    def __init__(
        self, config: Siglip2Config, ops: TorchOps, site: SiteConfig | None = None
    ) -> None:
        super().__init__(config, ops, site)
        self.patch = Linear(config.inputs, config.width, ops, bias=True)
        self.position = nn.Parameter(torch.empty(config.table**2, config.width))
        self.grid = config.side, config.columns

    def patches(self, pixels: Tensor) -> Tensor:
        (rows, columns), side = self.grid, self.config.patch
        split = pixels.view(-1, 3, rows, side, columns, side)
        embedded: Tensor = self.patch(split.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))
        return embedded

    def embedded(self, patches: Tensor) -> Tensor:
        embedded: Tensor = self.patch(patches.permute(0, 2, 3, 1).flatten(1))[None]
        return embedded

    def positions(self) -> Tensor:
        """The learned grid resampled to that of the patches: rows, then columns, each by a product
        with constants, in float32."""
        table, width = self.position, self.position.shape[1]
        side = round(table.shape[0] ** 0.5)
        rows, columns = (bilinear(side, count).to(table.device) for count in self.grid)
        found = rows @ cast(table, torch.float32).view(side, side * width)
        found = columns @ found.view(self.grid[0], side, width)
        return cast(found.reshape(-1, width), table.dtype)


def bilinear(side: int, wanted: int) -> Tensor:
    """What each of `wanted` points has of `side` points of a line, antialiased where there are
    fewer: float32 [wanted, side]."""
    with torch.device("cpu"), torch.no_grad():
        points = torch.eye(side)[None, None]
        return F.interpolate(points, size=(wanted, side), mode="bilinear", antialias=True)[0, 0]
