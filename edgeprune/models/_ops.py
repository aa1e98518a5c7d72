"""The few operations that a graph dialect may lower in its own way; here in plain torch.

`TorchOps` is the eager reference. A dialect of `edgeprune.export` subclasses it and replaces what
it has a better operator for. Queries, keys, values and caches have a layout of the dialect's own:
here [1, heads, tokens, head], elsewhere perhaps [1, tokens, heads * head]. `split` makes it,
`join` undoes it, `by_head` shows it as [1, heads, tokens, head] to whoever looks at attention. A
call writes its S tokens into a cache at slot `start` and attends to `start + S` of them.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from edgeprune.models._layers import join_heads, split_heads


class TorchOps:
    """Plain torch, any shape, no assumption about tracing."""

    packed: ClassVar[bool] = False  # whether heads lie side by side: [1, S, heads * head]

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / rms(x) * weight over the last axis, computed in float32."""
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return weight * scaled.to(x.dtype)

    def split(self, x: Tensor, heads: int) -> Tensor:
        """[1, S, heads * head] in the layout of attention."""
        return split_heads(x, heads)

    def join(self, x: Tensor) -> Tensor:
        """Out of the layout of attention: [1, S, heads * head]."""
        return join_heads(x)

    def by_head(self, x: Tensor, heads: int) -> Tensor:
        """Out of the layout of attention: [1, heads, S, head]."""
        return x

    def cache_shape(self, heads: int, capacity: int, head: int) -> tuple[int, ...]:
        """A cache for `capacity` tokens, in the layout of attention."""
        return 1, heads, capacity, head

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, heads: int) -> Tensor:
        """Rotary embedding, halves convention; positions int64 [1, S]."""
        at_cos, at_sin = (t.index_select(0, positions[0])[None, None] for t in (cos, sin))
        half = x.shape[-1] // 2
        low, high = x[..., :half], x[..., half:]
        return torch.cat([low * at_cos - high * at_sin, high * at_cos + low * at_sin], dim=-1)

    def write(self, past: Tensor, new: Tensor, start: Tensor) -> Tensor:
        """The cache with `new` written at slot `start` (int64 [1])."""
        at = start + torch.arange(new.shape[2], device=new.device)
        return past.index_copy(2, at, new)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, start: Tensor, heads: tuple[int, int]
    ) -> Tensor:
        """Causal attention of the new tokens to the cache; `heads` of queries, of keys."""
        slots = torch.arange(key.shape[2], device=key.device)
        rows = start + torch.arange(query.shape[2], device=query.device)
        mask = slots[None, :] <= rows[:, None]  # [S, capacity]
        grouped = heads[0] != heads[1]
        return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=grouped)

    def attend_all(
        self, query: Tensor, key: Tensor, value: Tensor, heads: int, bias: Tensor | None = None
    ) -> Tensor:
        """Full attention, no cache: the vision encoder's; `bias` [S, S] is added to the logits."""
        return F.scaled_dot_product_attention(query, key, value, bias)

    def last(self, x: Tensor) -> Tensor:
        """The last token: [1, S, width] -> [1, 1, width]."""
        return x[:, -1:]
