"""The gated delta rule (Yang et al. 2024, arXiv 2412.06464), in chunks of tokens.

Each head has a matrix S [key, value]. A token with key k, value v, a learning rate b and a decay
exp(g), g <= 0, makes S <- exp(g) S, then S <- S + k (b (v - S^T k))^T; its query reads S^T q.
What a token writes depends on what the earlier tokens of its chunk wrote. These dependencies are a
unit lower triangular system, which is solved once a chunk. Only S goes from chunk to chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 64
"""Tokens of a chunk, at most."""


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Queries and keys [n, heads, S, key], values [n, heads, S, value], g and b [n, heads, S] and
    the state [n, heads, key, value], all float32 -> what is read [n, heads, S, value], and the
    state after the tokens."""
    read = [value[:, :, :0]]
    for start in range(0, query.shape[2], CHUNK):
        tokens = query, key, value, decay, beta
        q, k, v, g, b = (x[:, :, start : start + CHUNK] for x in tokens)
        found, state = _chunk(q, k, v, g, b, state)
        read.append(found)
    return torch.cat(read, dim=2), state


def _chunk(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    total, rate = decay.cumsum(-1), beta[..., None]
    apart = decay[..., None].expand(*decay.shape, decay.shape[-1]).tril(-1).cumsum(-2)
    between = apart.exp().tril()  # decay of the one token till the other: no difference of sums
    since = total.exp()[..., None]
    system = (rate * key) @ key.transpose(-1, -2) * between
    wanted = rate * (value - since * (key @ state))
    written = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    read = since * (query @ state) + (query @ key.transpose(-1, -2) * between) @ written
    left = between[..., -1, :, None] * key  # of each token at the chunk's end
    return read, since[..., -1:, :] * state + left.transpose(-1, -2) @ written
