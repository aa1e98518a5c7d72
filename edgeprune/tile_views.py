"""Views of one image as pixels of one shape, where the view of the whole is smaller than a tile.

An encoder whose views have any shape (LFM2-VL's) is frozen for that of a tile. The view of the
whole then stands in a tile's place, block by block: the pixels of its first visual token are in the
place of the tile's first, and so on; what is left over is padding, which nothing attends to. A
fourth channel says what a pixel is of.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgeprune.patches import as_patches
from edgeprune.tiling import Tiling

Pixels = NDArray[np.float32]

OF_TILE, OF_WHOLE, OF_NOTHING = 0, 1, -1
"""What the fourth channel says: a tile, the view of the whole, padding."""


def arranged(views: Sequence[Pixels], tiling: Tiling) -> Pixels:
    """Tiles and the view of the whole, each [1, 3, height, width], as an encoder takes them:
    [tiles, channels, side, side]."""
    if tiling.overview_size is None:
        return np.concatenate(views)
    tiles = np.concatenate(views[:-1])
    marks = np.full_like(tiles[:, :1], OF_TILE)
    marked = np.concatenate([tiles, marks], axis=1)
    return np.concatenate([marked, _in_blocks(views[-1][0], tiling)])


def _in_blocks(whole: Pixels, tiling: Tiling) -> Pixels:
    """[3, height, width] -> [1, 4, side, side]."""
    (rows, columns), across = tiling.overview_grid, tiling.tokens
    block = tiling.block
    places = np.zeros((across * across, 4, block, block), np.float32)
    places[:, 3] = OF_NOTHING
    places[: rows * columns, :3] = as_patches(whole, block)
    places[: rows * columns, 3] = OF_WHOLE
    raster = places.reshape(across, across, 4, block, block).transpose(2, 0, 3, 1, 4)
    return raster.reshape(1, 4, tiling.tile, tiling.tile)
