"""SigLIP2 for images of any shape: a learned square grid of positions, resampled to the image's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune.errors import SpecError
from edgeprune.models._encoder import Encoder, EncoderConfig
from edgeprune.models._encoder_site import Runs, SiteConfig, Units
from edgeprune.models._layers import Linear
from edgeprune.models._ops import TorchOps, cast
from edgeprune.models._vision_tower import Encoding
from edgeprune.tile_views import OF_NOTHING, OF_TILE

FAR = -1e4
"""Added to a logit, leaves nothing of its softmax; float16 holds it."""


@dataclass(frozen=True, slots=True)
class Siglip2Config(EncoderConfig):
    """`image` is the height of an image in pixels."""

    columns: int = 1  # patches a row
    table: int = 16  # learned positions a side
    merge: int = 1  # patches a side of a token
    overview: tuple[int, int] | None = None  # rows and columns of the tokens of a view that may
    # stand in a tile's place, where its shape is another; tile_views.py says how

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
        if self.overview is not None:
            raise SpecError(
                "--encoder chooses among equally many patches of each view, and the view of the"
                " whole image has fewer than a tile; choose an --image-size that is one view"
            )
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

    config: Siglip2Config

    def __init__(
        self, config: Siglip2Config, ops: TorchOps, site: SiteConfig | None = None
    ) -> None:
        super().__init__(config, ops, site)
        self.patch = Linear(config.inputs, config.width, ops, bias=True)
        self.position = nn.Parameter(torch.empty(config.table**2, config.width))
        self.grid = config.side, config.columns

    def enter(self, pixels: Tensor) -> Encoding:
        if self.config.overview is None:
            return super().enter(pixels)
        marks = self._marks(pixels)
        positions = torch.where((marks == OF_TILE)[..., None], *self._positions_by_view())
        padding = marks == OF_NOTHING
        bias = torch.where(padding, FAR, 0.0)[:, None, None].expand(-1, 1, padding.shape[1], -1)
        x = self.patches(pixels[:, :3]) + positions
        return Encoding(x, attention_bias=cast(bias, x.dtype))

    def _marks(self, pixels: Tensor) -> Tensor:
        """What each patch is of: float32 [tiles, N]."""
        (rows, columns), side = self.grid, self.config.patch
        split = cast(pixels[:, 3], torch.float32).view(-1, rows, side, columns, side)
        return split[:, :, 0, :, 0].flatten(1)

    def _positions_by_view(self) -> tuple[Tensor, Tensor]:
        """Positions of a tile, and of the other view in a tile's place: each [N, width]."""
        assert self.config.overview is not None
        merge, (rows, columns) = self.config.merge, self.config.overview
        whole = self._resampled((rows * merge, columns * merge))
        order = in_blocks(self.grid, self.config.overview, merge)
        return self.positions(), whole.index_select(0, torch.tensor(order, device=whole.device))

    def patches(self, pixels: Tensor) -> Tensor:
        (rows, columns), side = self.grid, self.config.patch
        split = pixels.view(-1, 3, rows, side, columns, side)
        embedded: Tensor = self.patch(split.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))
        return embedded

    def embedded(self, patches: Tensor) -> Tensor:
        embedded: Tensor = self.patch(patches.permute(0, 2, 3, 1).flatten(1))[None]
        return embedded

    def positions(self) -> Tensor:
        return self._resampled(self.grid)

    def _resampled(self, grid: tuple[int, int]) -> Tensor:
        """The learned grid resampled to a grid of patches: rows, then columns, each by a product
        with constants, in float32."""
        table, width = self.position, self.position.shape[1]
        side = round(table.shape[0] ** 0.5)
        rows, columns = (bilinear(side, count).to(table.device) for count in grid)
        found = rows @ cast(table, torch.float32).view(side, side * width)
        found = columns @ found.view(grid[0], side, width)
        return cast(found.reshape(-1, width), table.dtype)


def in_blocks(grid: tuple[int, int], overview: tuple[int, int], merge: int) -> list[int]:
    """For each patch of a grid, row by row, the patch of a view of `overview` tokens that stands in
    its place, token by token; the first one's where none does."""
    (rows, columns), across = overview, grid[1] // merge
    found = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            token = row // merge * across + column // merge
            down, right = divmod(token, columns)
            patch = (down * merge + row % merge) * columns * merge + right * merge + column % merge
            found.append(patch if token < rows * columns else 0)
    return found


def bilinear(side: int, wanted: int) -> Tensor:
    """What each of `wanted` points has of `side` points of a line, antialiased where there are
    fewer: float32 [wanted, side]."""
    with torch.device("cpu"), torch.no_grad():
        points = torch.eye(side)[None, None]
        return F.interpolate(points, size=(wanted, side), mode="bilinear", antialias=True)[0, 0]
