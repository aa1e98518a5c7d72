"""The few operations that a graph dialect may lower in its own way; here in plain torch.

`TorchOps` is the eager reference. A dialect of `edgeprune.export` subclasses it and replaces what
it has a better operator for. Queries, keys, values and caches are [1, heads, tokens, head]. A
call writes its S tokens into a cache at slot `start` and attends to `start + S` of them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def scalar(value: float, like: Tensor) -> Tensor:
    """A number rounded to the dtype of `like`, to which it is applied: [].

    A graph holds it in float32 and rounds it by a Cast, so a float32 copy of the graph has the
    number itself and can be compared with a float32 model to the last digits.
    """
    return torch.tensor(value).to(like.dtype)


class TorchOps:
    """Plain torch, any shape, no assumption about tracing."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / rms(x) * weight over the last axis, computed in float32."""
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return weight * scaled.to(x.dtype)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
        """Rotary embedding, halves convention; positions int64 [1, S]."""
        at_cos, at_sin = (t.index_select(0, positions[0])[None, None] for t in (cos, sin))
        half = x.shape[-1] // 2
        low, high = x[..., :half], x[..., half:]
        return torch.cat([low * at_cos - high * at_sin, high * at_cos + low * at_sin], dim=-1)

    def write(self, past: Tensor, new: Tensor, start: Tensor) -> Tensor:
        """The cache with `new` written at slot `start` (int64 [1])."""
        at = start + torch.arange(new.shape[2], device=new.device)
        return past.index_copy(2, at, new)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, start: Tensor) -> Tensor:
        """Causal attention of the new tokens to the cache; query heads may share a key's."""
        slots = torch.arange(key.shape[2], device=key.device)
        rows = start + torch.arange(query.shape[2], device=query.device)
        mask = slots[None, :] <= rows[:, None]  # [S, capacity]
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=grouped)

    def attend_all(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """Full attention, no cache: the vision encoder's; `bias` [S, S] is added to the logits."""
        return F.scaled_dot_product_attention(query, key, value, bias)

    def last(self, x: Tensor) -> Tensor:
        """The last token: [1, S, width] -> [1, 1, width]."""
        return x[:, -1:]
