"""How much one frame differs from another, so that a scene that stands still is not asked again."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CELLS, SAMPLES = 16, 64
"""A frame is looked at in 16 x 16 cells, each by 4 x 4 means of its grey levels."""

Levels = NDArray[np.float32]


def levels(image: Image.Image) -> Levels:
    """Grey levels of a frame, averaged: [64, 64] from 0 to 1."""
    small = image.convert("L").resize((SAMPLES, SAMPLES), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / np.float32(255)


def change(now: Levels, before: Levels) -> float:
    """The mean difference in the cell that changed most, from 0 to 1. A small thing that moves
    counts as much as a large one; the noise of single pixels is averaged away."""
    side = SAMPLES // CELLS
    cells = np.abs(now - before).reshape(CELLS, side, CELLS, side).mean((1, 3))
    return float(cells.max())
