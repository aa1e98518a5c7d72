"""How what a vision encoder says of an image's tiles becomes the visual tokens of the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from edgeprune.models._permutation import inverse

NEWLINE = -1
"""In a layout's order, the model's newline token; lower numbers are its other fixed tokens."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The reading order of the V visual tokens of a prompt, for one frozen input size.

    A tile, or a whole image or frame, of `side` x `side` patches has (side / merge)^2 tokens.
    `order` names for each visual token the tile token that it is, counted over all tiles, or as
    -1 - n the fixed token n: the newline, then [CLS] of each tile if `cls`, then those of `text`.
    """

    tiles: int
    side: int  # patches a side of a tile
    merge: int  # patches a side that become one token
    order: tuple[int, ...]
    grid: tuple[int, int]  # rows, columns of the V tokens; (1, V) where they are no rectangle
    across: int | None = None  # patches a row of a tile that is no square
    pool: str = "join"  # merged patches stand side by side; "mean": their mean; "resize": the
    # projected ones resized to half a side (rounded up) by bilinear interpolation
    newline: bool = False  # whether there is one
    cls: bool = False  # whether [CLS] tokens are read too
    text: tuple[int, ...] = ()  # ids of text between images
    shown: tuple[int, ...] = ()  # tokens of each tile that show something, where the last ones of
    # some are padding that nothing attends to; empty where all do

    @classmethod
    def plain(
        cls,
        side: int,
        merge: int = 1,
        tiles: int = 1,
        across: int | None = None,
        pool: str = "join",
    ) -> Layout:
        """Tile after tile, row after row."""
        layout = cls(tiles, side, merge, (), (0, 0), across, pool)
        rows, columns = layout.tile_grid
        order = tuple(range(tiles * rows * columns))
        return replace(layout, order=order, grid=(tiles * rows, columns))

    @classmethod
    def with_cls(cls, side: int, tiles: int = 1) -> Layout:
        """Tile after tile, [CLS] of each and then its patches row after row."""
        order, size = list[int](), side**2
        for tile in range(tiles):
            order += [-1 - tile, *range(tile * size, (tile + 1) * size)]
        return cls(tiles, side, 1, tuple(order), (1, len(order)), cls=True)

    @property
    def tile_grid(self) -> tuple[int, int]:
        """Rows and columns of the tokens of one tile."""
        up = self.merge - 1 if self.pool == "resize" else 0
        return (self.side + up) // self.merge, ((self.across or self.side) + up) // self.merge

    @property
    def visual_tokens(self) -> int:
        return len(self.order)

    @property
    def is_plain(self) -> bool:
        """Whether the visual tokens are the patches of one tile, row by row."""
        return self.order == tuple(range(self.side**2))

    @property
    def fixed(self) -> tuple[int, ...]:
        """Positions of the fixed tokens among the V visual tokens."""
        return tuple(i for i, source in enumerate(self.order) if source < 0)

    @property
    def from_tiles(self) -> tuple[int, ...]:
        """Positions of all others among the V visual tokens."""
        return tuple(i for i, source in enumerate(self.order) if source >= 0)

    @property
    def tile_of(self) -> tuple[int, ...]:
        """Of each token of a tile, in reading order, the tile; empty where there is one tile."""
        size = self.tile_grid[0] * self.tile_grid[1]
        return tuple(o // size for o in self.order if o >= 0) if self.tiles > 1 else ()

    @property
    def group_of(self) -> tuple[int, ...]:
        """The same of all V visual tokens; a fixed one counts to the tile that is read before it,
        or to the first."""
        if self.tiles == 1:
            return ()
        size, groups = self.tile_grid[0] * self.tile_grid[1], list[int]()
        for source in self.order:
            groups.append(source // size if source >= 0 else (groups or [0])[-1])
        return tuple(groups)

    @property
    def image_of(self) -> tuple[int, ...]:
        """Of all V visual tokens the tile, where each is an image of its own; -1 for fixed ones."""
        size = self.tile_grid[0] * self.tile_grid[1]
        return tuple(source // size if source >= 0 else -1 for source in self.order)

    def ids(self, token: int) -> tuple[int, ...]:
        """Ids of the V visual tokens in transformers' `input_ids`: `token`, or text between
        images."""
        first = int(self.newline) + (self.tiles if self.cls else 0)
        return tuple(
            self.text[-1 - source - first] if source < -first else token for source in self.order
        )

    @property
    def by_tile(self) -> bool:
        """Whether all tokens of a tile are read before those of the next one."""
        own = [source for source in self.order if source >= 0]
        return own == sorted(own)

    @property
    def why_whole(self) -> str:
        """Why every patch of a tile has to leave the encoder; empty where some need not."""
        size, own = self.tiles * self.tile_grid[0] * self.tile_grid[1], len(self.from_tiles)
        if self.late:
            return "its visual tokens are resized from all patches of a frame"
        if own < size:
            return (
                f"{size - own} of {size} tokens of its tiles are padding that is left out, so tiles"
                " have different numbers; choose an --image-size that fills them"
            )
        return "" if self.by_tile or self.fixed else "its tiles are read in turns"

    @property
    def late(self) -> bool:
        """Whether patches are projected before they are merged."""
        return self.pool == "resize"

    def chained(self, between: Sequence[Sequence[int]]) -> Layout:
        """The same once more after each run of text, given as ids; for images in one prompt."""
        order, size = list(self.order), self.tiles * self.tile_grid[0] * self.tile_grid[1]
        times, (rows, columns) = len(between) + 1, self.grid
        text, first = list[int](), int(self.newline) + (times * self.tiles if self.cls else 0)
        for number, ids in enumerate(between, start=1):
            order += [-1 - first - len(text) - i for i in range(len(ids))]
            order += [self._moved(source, number, size) for source in self.order]
            text += ids
        grid = (1, len(order)) if text or self.fixed else (times * rows, columns)
        tiles = times * self.tiles
        return replace(self, tiles=tiles, order=tuple(order), grid=grid, text=tuple(text))

    def padded(self, shown: Sequence[int]) -> Layout:
        """The same where of each tile only so many tokens, the first ones, show something."""
        rows, columns = self.tile_grid
        size = rows * columns
        order = tuple(s for s in self.order if s < 0 or s % size < shown[s // size])
        return replace(self, order=order, grid=(1, len(order)), shown=tuple(shown))

    def shown_patches(self, device: torch.device) -> Tensor | None:
        """Which patches of each tile show something, bool [tiles, patches]; None where all do."""
        if not self.shown:
            return None
        rows, columns = self.tile_grid
        tokens = torch.arange(rows * columns).view(1, rows, columns)
        shown = tokens < torch.tensor(self.shown)[:, None, None]
        wide = shown.repeat_interleave(self.merge, 1).repeat_interleave(self.merge, 2)
        return wide.flatten(1).to(device)

    def parted(self, between: Sequence[Sequence[int]]) -> Layout:
        """The same with runs of text, given as ids, between parts of equal size; for one whose
        tokens are all of its tiles."""
        part, order, text = len(self.order) // (len(between) + 1), list[int](), list[int]()
        for number, ids in enumerate((*between, ())):
            order += self.order[number * part : (number + 1) * part]
            order += range(-1 - len(text), -1 - len(text) - len(ids), -1)
            text += ids
        grid = (1, len(order)) if text else self.grid
        return replace(self, order=tuple(order), grid=grid, text=tuple(text))

    def _moved(self, source: int, number: int, size: int) -> int:
        """What stands in an image's place in the one that comes `number` images later, each of
        `size` tile tokens; all share the newline."""
        if source >= 0:
            return source + number * size
        return source if source == NEWLINE and self.newline else source - number * self.tiles

    def tokens(self, features: Tensor) -> Tensor:
        """Tokens of the tiles in reading order: [tiles, patches, width] -> [1, C, ...], C = V less
        the fixed tokens; merged patches side by side, averaged or resized."""
        if self.pool == "join":
            return self._in_order(self._grouped(features).flatten(2))[None]
        return self.mean(features)[None]

    def mean(self, values: Tensor) -> Tensor:
        """The mean over each token's patches, in reading order: [tiles, patches, ...] ->
        [C, ...]."""
        wide = values.flatten(2) if values.dim() > 2 else values[..., None]
        means = self._resized(wide) if self.late else self._grouped(wide).mean(2)
        return self._in_order(means).reshape(-1, *values.shape[2:])

    def left_tokens(self, features: Tensor) -> Tensor:
        """Tokens that are left of the tiles, tile after tile: [tiles, K * merge^2, width] ->
        [1, tiles * K, ...], merged patches side by side or averaged."""
        grouped = features.reshape(-1, self.merge**2, features.shape[-1])
        return (grouped.flatten(1) if self.pool == "join" else grouped.mean(1))[None]

    def left_means(self, values: Tensor) -> Tensor:
        """The mean over the patches of each token that is left: [tiles, K * merge^2, ...] ->
        [tiles * K, ...]."""
        return values.reshape(-1, self.merge**2, *values.shape[2:]).mean(1)

    def left_indices(self, units: Tensor) -> Tensor:
        """Which of the C tile tokens in reading order are left, tile after tile: int64 [tiles, K]
        of each tile -> int64 [tiles * K]."""
        size = self.tile_grid[0] * self.tile_grid[1]
        firsts = size * torch.arange(self.tiles, device=units.device)[:, None]
        of_tiles = (units + firsts).flatten()
        if self.by_tile:
            return of_tiles
        own = [source for source in self.order if source >= 0]
        return torch.tensor(inverse(own), device=units.device).index_select(0, of_tiles)

    def left_groups(self, count: int) -> tuple[int, ...]:
        """`group_of` where `count` tokens of each tile are left; they are read tile by tile."""
        seen, found = dict[int, int](), list[int]()
        for source, group in zip(self.order, self.group_of, strict=True):
            seen[group] = seen.get(group, 0) + (source >= 0)
            if source < 0 or seen[group] <= count:
                found.append(group)
        return tuple(found)

    def among_all(self, values: Tensor, other: float) -> Tensor:
        """Values of the tile tokens with `other` at the fixed ones: [C] -> [V]."""
        whole = values.new_full((self.visual_tokens,), other)
        whole[list(self.from_tiles)] = values
        return whole

    def _grouped(self, x: Tensor) -> Tensor:
        """[tiles, patches, width] -> [tiles, tokens, merge^2, width], each group row by row."""
        tiles, _, width = x.shape
        rows, columns = self.tile_grid
        if self.merge == 1:
            return x[:, :, None]
        split = x.view(tiles, rows, self.merge, columns, self.merge, width)
        return split.transpose(2, 3).reshape(tiles, rows * columns, self.merge**2, width)

    def _resized(self, x: Tensor) -> Tensor:
        """[tiles, patches, width] -> [tiles, tokens, width], bilinear."""
        tiles, _, width = x.shape
        image = x.transpose(1, 2).reshape(tiles, width, self.side, self.across or self.side)
        small = F.interpolate(image, size=self.tile_grid, mode="bilinear")
        return small.flatten(2).transpose(1, 2)

    def _in_order(self, x: Tensor) -> Tensor:
        """[tiles, tokens, width] -> [C, width]."""
        x = x.flatten(0, 1)
        wanted = [source for source in self.order if source >= 0]
        if wanted == list(range(x.shape[0])):
            return x
        return x.index_select(0, torch.tensor(wanted, device=x.device))
