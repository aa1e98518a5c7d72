"""Selectors: from scores to the positions that stay. Ties go to the lower position."""

from __future__ import annotations

import torch
from torch import Tensor


def top(scores: Tensor, keep: int) -> Tensor:
    """Positions of the `keep` largest scores, rising: float32 [n] -> int64 [keep]."""
    if torch.compiler.is_exporting():  # ONNX TopK gives ties to the lower index; torch may not
        best = torch.topk(scores, keep).indices
    else:
        best = torch.argsort(scores, descending=True, stable=True)[:keep]
    return ascending(best)


def ascending(positions: Tensor) -> Tensor:
    """Positions sorted, so that causal order survives: int64 [k] -> int64 [k]."""
    return torch.topk(positions, positions.shape[0], largest=False).values


def lattice(grid: tuple[int, int], keep: int) -> list[int]:
    """`keep` positions spread evenly over a raster of rows x columns, rising.

    A rows x columns sub-lattice where `keep` has factors near the raster's aspect, cell centres
    floor((i + 1/2) * n / k); otherwise even steps along the raster.
    """
    rows, columns = grid
    for down in sorted(range(1, rows + 1), key=lambda d: abs(d * columns - keep * rows / d)):
        across, rest = divmod(keep, down)
        if not rest and across <= columns and max(down, across) <= 2 * min(down, across):
            ys, xs = _centres(rows, down), _centres(columns, across)
            return [y * columns + x for y in ys for x in xs]
    return _centres(rows * columns, keep)


def _centres(size: int, parts: int) -> list[int]:
    return [(2 * i + 1) * size // (2 * parts) for i in range(parts)]
