"""Density-peak clusters (DPC-KNN) and their averages, as matrix products of fixed size.

Every function takes n = 0 tokens, as a decode step has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgeprune.policies._select import ranked
from edgeprune.policies._sizes import total

FAR = 1e12
"""A squared distance beyond that of any two tokens."""


def clusters(tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`count` = min(clusters, n) clusters of n tokens: [n, width] -> int64 [count], [count, n].

    First the clusters' centres, the most prominent first, then the members of each, 1 or 0.
    """
    apart = distances(tokens)
    centres = density_peaks(apart, count)
    return centres, assign(apart, centres)


def distances(tokens: Tensor) -> Tensor:
    """D_ij^2 = |x_i - x_j|^2 / width of each pair: [n, width] -> float32 [n, n].

    All differences at once would take n * n * width floats, 0.9 GB for 468 patches of CLIP-L, so it
    is a matrix product and a few n * n floats. What differences give for nothing is kept: the
    result is symmetric and 0 on the diagonal, so mutual neighbours still tie; with the mean as
    origin, what all tokens share cancels before it can drown their differences.
    """
    wide = tokens.float()
    wide = wide - torch.cat([wide, wide.new_zeros(1, wide.shape[1])]).mean(0)
    product = wide @ wide.T
    indices = torch.arange(tokens.shape[0], device=tokens.device)
    itself = (indices[:, None] == indices[None, :]).float()
    lengths = total(product * itself, 1)
    squares = lengths[:, None] + lengths[None, :] - (product + product.T)
    return squares.clamp(min=0) * (1 - itself) / tokens.shape[1]


def density_peaks(apart: Tensor, count: int) -> Tensor:
    """Centres of `count` clusters, the most prominent first: squared distances [n, n] -> int64
    [count].

    Density rho_i = exp(-mean of D_ij^2 over the `count` nearest j, i among them). Prominence is
    rho_i * delta_i, delta_i the least distance to a denser token, beyond all where none is denser.
    Both in logarithms, which order alike, so that no density runs out of digits.
    """
    sparsity = total(apart.topk(count, largest=False).values, 1) / count
    denser = sparsity[None, :] < sparsity[:, None]
    reach = torch.where(denser, apart, FAR)
    nearest = torch.cat([reach, apart.new_full((apart.shape[0], 1), FAR)], dim=1).amin(1)
    return ranked(nearest.log() / 2 - sparsity, count)


def assign(apart: Tensor, centres: Tensor) -> Tensor:
    """Who belongs to the cluster of which centre, 1 or 0: [n, n], int64 [k] -> float32 [k, n].

    Each token goes to its nearest centre, of equals to the first; a centre to itself.
    """
    indices = torch.arange(apart.shape[0], device=apart.device)
    rows = torch.where(centres[:, None] == indices[None, :], -1, apart.index_select(0, centres))
    nearest = torch.cat([rows, apart.new_full((1, apart.shape[0]), FAR)]).argmin(0)
    clusters = torch.arange(centres.shape[0], device=apart.device)
    return (clusters[:, None] == nearest[None, :]).float()


def average(members: Tensor, tokens: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of each cluster's tokens, uniform or weighted: [k, n], [n, width] -> float32 [k, width].

    A cluster without members, or whose weights are all 0, gives zeros: it adds nothing.
    """
    shares = members if weights is None else members * weights.float()
    mass = total(shares, 1, keepdim=True)
    return shares @ tokens.float() / torch.where(mass > 0, mass, 1)
