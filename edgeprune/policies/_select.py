"""Selectors: from scores or tokens to the positions that stay. Ties go to the lower position.

A greedy selector is unrolled: three small nodes for each token that it keeps.
"""

from __future__ import annotations

import torch
from torch import Tensor


def top(scores: Tensor, keep: int) -> Tensor:
    """Positions of the `keep` largest scores, rising: float32 [n] -> int64 [keep]."""
    return ascending(ranked(scores, keep))


def ranked(scores: Tensor, keep: int) -> Tensor:
    """Positions of the `keep` largest scores, the largest first, along the last axis:
    float32 [.., n] -> int64 [.., keep]."""
    if torch.compiler.is_exporting():  # ONNX TopK gives ties to the lower index; torch may not
        return torch.topk(scores, keep).indices
    return torch.argsort(scores, descending=True, stable=True)[..., :keep]


def ascending(positions: Tensor) -> Tensor:
    """Positions sorted, so that causal order survives: int64 [k] -> int64 [k]."""
    return torch.topk(positions, positions.shape[0], largest=False).values


TAKEN = 1e6
"""Far outside what cosines and their sums can reach: marks the tokens that were chosen."""


def max_min(tokens: Tensor, keep: int) -> Tensor:
    """Greedy max-min diversity with distance 1 - cosine: [n, width] -> int64 [keep], rising.

    First the token whose nearest other is furthest, then those whose nearest chosen is.
    """
    distances = 1 - cosines(tokens)
    indices = torch.arange(tokens.shape[0], device=tokens.device)
    itself = (indices[:, None] == indices[None, :]).float()
    nearest, distances = (distances + TAKEN * itself).amin(1)[None], distances - TAKEN * itself
    for step in range(keep):
        row = distances.index_select(0, nearest.argmax(1))  # [1, n]: TensorRT wants two axes
        nearest = torch.minimum(nearest, row) if step else row
    return top((nearest[0] < -TAKEN / 2).float(), keep)


def min_sum(tokens: Tensor, steps: int, keep: int) -> Tensor:
    """Greedy choice of `keep` = min(steps, n) tokens, rising: [n, width] -> int64 [keep].

    First the token of least total cosine to all, then those of least total to the chosen ones.
    `steps` is fixed while n may be 0, so a row is added that is chosen only where nothing is left.
    """
    tokens = torch.cat([tokens, tokens.new_zeros(1, tokens.shape[1])])
    similar = cosines(tokens)
    indices = torch.arange(similar.shape[0], device=tokens.device)
    last = (indices == tokens.shape[0] - 1).float()
    itself = (indices[:, None] == indices[None, :]).float()
    total, similar = (similar.sum(1) + TAKEN * last)[None], similar + TAKEN * itself
    for step in range(steps):
        row = similar.index_select(0, total.argmin(1))  # [1, n + 1]: TensorRT wants two axes
        total = total + row if step else row + TAKEN * last
    return top((total[0, :-1] > TAKEN / 2).float(), keep)


def cosines(tokens: Tensor) -> Tensor:
    """Cosine of each pair, float32, 0 with a token of zeros: [n, width] -> [n, n]."""
    directions = unit(tokens)
    product: Tensor = directions @ directions.T
    return product


def unit(tokens: Tensor) -> Tensor:
    """Tokens of length 1, float32, zeros where a token is: [n, width] -> [n, width]."""
    wide = tokens.float()
    lengths: Tensor = wide.norm(dim=-1, keepdim=True)
    return wide / lengths.clamp(min=1e-12)


def lattice(grid: tuple[int, int], keep: int) -> list[int]:
    """`keep` positions spread evenly over a raster of rows x columns, rising.

    A rows x columns sub-lattice where `keep` has factors near the raster's aspect, cell centres
    floor((i + 1/2) * n / k); otherwise even steps along the raster.
    """
    rows, columns = grid
    for down in sorted(range(1, rows + 1), key=lambda d: abs(d * columns - keep * rows / d)):
        across, rest = divmod(keep, down)
        if not rest and across <= columns and max(down, across) <= 2 * min(down, across):
            ys, xs = steps(rows, down), steps(columns, across)
            return [y * columns + x for y in ys for x in xs]
    return steps(rows * columns, keep)


def steps(size: int, parts: int) -> list[int]:
    """The middles of `parts` equal parts of a range, rising: floor((i + 1/2) * size / parts)."""
    return [(2 * i + 1) * size // (2 * parts) for i in range(parts)]
