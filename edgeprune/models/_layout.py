"""How what a vision encoder says of a picture's tiles becomes the visual tokens of the decoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SEPARATOR = -1
"""In a layout's order: no tile's token, but one that the model puts between them."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The reading order of a picture's V visual tokens, for one frozen input size.

    A tile of `side` x `side` patches has (side / merge)^2 tokens. `order` names for each visual
    token the tile token that it is, counted over all tiles, or SEPARATOR.
    """

    tiles: int
    side: int  # patches a side of a tile
    merge: int  # patches a side that become one token
    order: tuple[int, ...]
    grid: tuple[int, int]  # rows, columns of the V tokens; (1, V) where they are no rectangle
    across: int | None = None  # patches a row of a tile that is no square

    @classmethod
    def plain(cls, side: int, merge: int = 1, tiles: int = 1, across: int | None = None) -> Layout:
        """Tile after tile, row after row."""
        rows, columns = side // merge, (across or side) // merge
        order = tuple(range(tiles * rows * columns))
        return cls(tiles, side, merge, order, (tiles * rows, columns), across)

    @property
    def visual_tokens(self) -> int:
        return len(self.order)

    @property
    def is_plain(self) -> bool:
        """Whether the visual tokens are the patches of one tile, row by row."""
        return self.order == tuple(range(self.side**2))

    @property
    def separators(self) -> tuple[int, ...]:
        """Their positions among the V visual tokens."""
        return tuple(i for i, source in enumerate(self.order) if source == SEPARATOR)

    @property
    def from_tiles(self) -> tuple[int, ...]:
        """Positions of all others among the V visual tokens."""
        return tuple(i for i, source in enumerate(self.order) if source != SEPARATOR)

    def join(self, features: Tensor) -> Tensor:
        """A token's patches side by side, tokens in reading order: [tiles, patches, width] ->
        [1, C, merge^2 * width], C = V less the separators."""
        joined = self._grouped(features).flatten(2)
        return self._in_order(joined)[None]

    def mean(self, values: Tensor) -> Tensor:
        """The mean over each token's patches, in reading order: [tiles, patches, ...] ->
        [C, ...]."""
        grouped = self._grouped(values.flatten(2) if values.dim() > 2 else values[..., None])
        means = self._in_order(grouped.mean(2))
        return means.reshape(-1, *values.shape[2:])

    def _grouped(self, x: Tensor) -> Tensor:
        """[tiles, patches, width] -> [tiles, tokens, merge^2, width], each group row by row."""
        tiles, _, width = x.shape
        rows, columns = self.side // self.merge, (self.across or self.side) // self.merge
        if self.merge == 1:
            return x[:, :, None]
        split = x.view(tiles, rows, self.merge, columns, self.merge, width)
        return split.transpose(2, 3).reshape(tiles, rows * columns, self.merge**2, width)

    def _in_order(self, x: Tensor) -> Tensor:
        """[tiles, tokens, width] -> [C, width]."""
        x = x.flatten(0, 1)
        wanted = [source for source in self.order if source != SEPARATOR]
        if wanted == list(range(x.shape[0])):
            return x
        return x.index_select(0, torch.tensor(wanted, device=x.device))
