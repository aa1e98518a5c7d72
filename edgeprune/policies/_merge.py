"""Mergers: who joins whom, as matrices of fixed size. Ties go to the lower position."""

from __future__ import annotations

import torch
from torch import Tensor

from edgeprune.policies._select import ranked, top
from edgeprune.policies._signals import LEAST
from edgeprune.policies._sizes import total


def others(chosen: Tensor, count: int) -> Tensor:
    """The positions of 0 .. count - 1 that are not among k chosen: int64 [k] -> [count - k]."""
    indices = torch.arange(count, device=chosen.device)
    taken = total((chosen[:, None] == indices[None, :]).float(), 0)
    return top(-taken, count - chosen.shape[0])


def split(scores: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The `keep` tokens with the largest scores and all others, each rising: [n] -> int64."""
    if keep == 0:
        return torch.arange(0), torch.arange(scores.shape[0])
    best = top(scores, keep)
    return best, others(best, scores.shape[0])


def join(similar: Tensor) -> Tensor:
    """Each token joins the target that it is most like: [k, n] -> members [k, n], 1 or 0.

    k and n may be 0, as in a decode step, where ONNX Runtime needs a row to look at.
    """
    targets = torch.arange(similar.shape[0], device=similar.device)
    least = similar.new_full((1, similar.shape[1]), LEAST)
    best = torch.cat([similar, least]).argmax(0)
    return (targets[:, None] == best[None, :]).float()


def weighted_neighbours(
    similar: Tensor, tokens: Tensor, weights: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """For each of k rows, its `count` most similar tokens, added up by their weights.

    [k, n], [n, width], [n] -> sum of w_j x_j, float32 [k, width], and sum of w_j, [k, 1].
    """
    nearest = ranked(similar, count)  # [k, count]
    shares = weights.index_select(0, nearest.flatten()).view(-1, 1, count)
    taken = tokens.float().index_select(0, nearest.flatten()).view(-1, count, tokens.shape[1])
    return (shares @ taken)[:, 0], shares.sum(-1)
