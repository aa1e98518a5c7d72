"""Selectors that avoid repeats: by determinants, pairs, pivots. Ties go to the lower position.

Those that run in the decoder take n = 0 tokens, as a decode step has.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgeprune.policies._select import TAKEN, cosines, ranked, top, unit

NOISE = 1e-4
"""Share of a token's own kernel value below which what is left of it is rounding: a kernel in
float32 is known to 1e-7 of it and each step adds its rounding: after 36, at 4e-4, 0.3% was seen."""
BLOCK = 32
"""Steps after which the chosen tokens are taken out of the kernel, so that no step grows."""


def determinant(vectors: Tensor, steps: int, keep: int) -> Tensor:
    """Greedy MAP of a determinantal point process: [n, width] -> int64 [keep], rising.

    The kernel is the vectors' Gram matrix L; each step takes the token that multiplies the
    determinant of the chosen rows by most, d_j^2, and takes its direction from the others: Cholesky
    row e = (L_j - sum_c c_j c) / d_j, d^2 -= e^2 (Chen et al. 2018, Algorithm 1). Tokens that the
    chosen ones span follow by L_ii. `steps` is fixed and keep = min(steps, n), as in `min_sum`.
    """
    wide = torch.cat([vectors.float(), vectors.new_zeros(1, vectors.shape[1]).float()])
    kernel, left = wide @ wide.T, wide.pow(2).sum(1)[None]
    indices = torch.arange(wide.shape[0], device=wide.device)[None]
    last = (indices == vectors.shape[0]).float()  # the row of zeros: chosen where nothing is left
    least = NOISE * left + 1e-12 * (1 - last) + 1e-18
    rows: Tensor | None = None
    for _ in range(steps):
        gain = torch.maximum(left, least)
        best = gain.argmax(1)
        row = kernel.index_select(0, best)
        if rows is not None:
            row = row - rows.index_select(1, best).T @ rows
        row = row / gain.index_select(1, best).sqrt()
        chosen = indices == best
        left = torch.where(chosen, -1, left - row * row)
        least = torch.where(chosen, -1, least)
        rows = row if rows is None else torch.cat([rows, row])
        if rows.shape[0] == BLOCK:
            kernel, rows = kernel - rows.T @ rows, None
    return top((least[0, :-1] < 0).float(), keep)


def without_pairs(tokens: Tensor, order: Tensor, keep: int, batch: int = 8) -> Tensor:
    """`keep` >= 1 of the tokens at `order`, repeats removed: [n, width], int64 [m] -> int64 [keep].

    In passes: of the tokens at even indices, the `batch` most alike (cosine) to some token at an
    odd one go. Those that stay, the most alike first, precede the odd ones in the next pass.
    """
    similar = cosines(tokens)
    while (excess := order.shape[0] - keep) > 0:
        even, odd = order[::2], order[1::2]
        alike = similar.index_select(0, even).index_select(1, odd).amax(1)
        stay = ranked(alike, even.shape[0])[min(batch, excess) :]
        order = torch.cat([even.index_select(0, stay), odd])
    return order


def unlike(tokens: Tensor, pivots: Tensor, quotas: Sequence[int], taken: Tensor) -> Tensor:
    """Marks of the tokens taken so far and those least alike to each pivot: float32 [n], 1 or 0.

    [n, width], [p, width], p ints, [n]: pivot after pivot takes as many free tokens as its quota,
    those of least cosine to it.
    """
    spare = max(quotas, default=0)  # rows that are taken where nothing else is left, as where n = 0
    tokens = torch.cat([tokens, tokens.new_zeros(spare, tokens.shape[1])])
    marks = torch.cat([taken, taken.new_ones(spare)])
    indices = torch.arange(tokens.shape[0], device=tokens.device)
    similar = unit(pivots) @ unit(tokens).T
    for pivot, quota in enumerate(quotas):
        if quota:
            picks = ranked(-similar[pivot] - TAKEN * marks, quota)
            marks = marks + (indices[None, :] == picks[:, None]).float().sum(0)
    return marks[: taken.shape[0]].clamp(max=1)
