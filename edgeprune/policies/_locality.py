"""How far each patch is from its neighbours, in features and in position."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

AROUND = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]
DISTANCE_WEIGHT = 0.5
"""w3 of VisionTrim; w1 and w2 are 1."""


def locality(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """VisionTrim's LTAM, as its released code has it: [N, width] -> float32 [N], at most 0.

    The mean over the 3 x 3 patches around one, itself among them and 0 for those outside, of
    -|F - F'|^2 / var F - w3 |P - P'|^2 / var P. Eq. 5 has the squares of the standard deviations;
    the code's variances, over all entries of an image, are those squares.
    """
    rows, columns = grid
    wide = features.float()
    feature_scale = wide.var().clamp(min=1e-12)
    distance_scale = float(np.indices(grid).var(ddof=1)) if rows * columns > 1 else 1.0
    total = wide.new_zeros(wide.shape[0])
    for dy, dx in AROUND:
        ys, xs = (step + np.arange(size)[:, None] for step, size in ((dy, rows), (dx, columns)))
        inside = ((ys >= 0) & (ys < rows)) & ((xs >= 0) & (xs < columns)).T
        indices = ys.clip(0, rows - 1) * columns + xs.clip(0, columns - 1).T
        neighbours = wide.index_select(0, torch.from_numpy(indices.ravel()).to(wide.device))
        apart = (wide - neighbours).pow(2).sum(1) / feature_scale
        far = DISTANCE_WEIGHT * (dy**2 + dx**2) / distance_scale
        total = total - (apart + far) * torch.from_numpy(inside.ravel()).to(wide)
    return total / 9
