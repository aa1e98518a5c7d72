"""The patches of an image."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def as_patches(
    pixels: NDArray[np.float32], patch: int, indices: NDArray[np.integer[Any]] | None = None
) -> NDArray[np.float32]:
    """A copy of all patches row by row, or of those of `indices` [n]: [3, H, W] ->
    [N, 3, patch, patch]. Pixels at the right and at the bottom that fill no patch are left out."""
    rows, columns = (side // patch for side in pixels.shape[1:])
    cut = pixels[:, : rows * patch, : columns * patch]
    split = cut.reshape(3, rows, patch, columns, patch).transpose(1, 3, 0, 2, 4)
    at = np.arange(rows * columns) if indices is None else indices
    found: NDArray[np.float32] = split[at // columns, at % columns]
    return found
