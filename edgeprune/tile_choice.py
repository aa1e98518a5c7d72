"""Which tiles of an image are encoded, where not all are: those that show most.

The choice looks at pixels alone, before anything is encoded, and how many are chosen is frozen. So
what follows is the model on fewer tiles: what it says of a tile is what it says of it among all.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgeprune.tiling import Tiling

Pixels = NDArray[np.float32]  # [tiles, 3, side, side], normalised


def chosen(pixels: Pixels, tiling: Tiling) -> Pixels:
    """Of all tiles, row by row and the view of the whole first or last where there is one, those
    that are encoded, in the same order: [tiling.tiles, 3, side, side]. Of equal ones the first."""
    if tiling.kept is None:
        return pixels
    first = int(tiling.overview == "first")
    tiles = pixels[first : first + tiling.cut]
    best = np.argsort(-contrast(tiles, tiling.tokens), kind="stable")
    kept = tiles[np.sort(best[: tiling.kept])]
    return np.concatenate([pixels[:first], kept, pixels[first + tiling.cut :]])


def contrast(tiles: Pixels, cells: int) -> NDArray[np.float64]:
    """How far the pixels of each tile are from the usual colour, on average: [n].

    That is, channel by channel, the median over the mean colours of `cells` x `cells` squares of
    every tile: of the ground, where there is one. Sensor noise adds the same to all.
    """
    count, channels, side, _ = tiles.shape
    width = side // cells
    inner = tiles[:, :, : cells * width, : cells * width]
    means = inner.reshape(count, channels, cells, width, cells, width).mean((3, 5))
    usual = np.median(means.swapaxes(0, 1).reshape(channels, -1), axis=1)
    far: NDArray[np.float64] = np.abs(tiles - usual[:, None, None]).mean((1, 2, 3))
    return far
