"""The few operations that a graph dialect may lower in its own way; here in plain torch.

`TorchOps` is the eager reference. A dialect of `edgeprune.export` subclasses it and replaces what
it has a better operator for. Queries, keys, values and caches are [1, heads, tokens, head]. A
call writes its S tokens into a cache at slot `start` and attends to the `end` = start + S that it
then holds; both are int64 [1].

In half precision a few parts of a model may stay in float32 (`Part.wide` of `_layers`). What their
operations then are is written here once, from operators that every dialect has.
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
        """x / rms(x) * weight over the last axis, computed in float32, in the weight's dtype."""
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return weight * cast(scaled, weight.dtype)

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

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, start: Tensor, end: Tensor
    ) -> Tensor:
        """Causal attention of the new tokens to the cache; query heads may share a key's."""
        mask = visible(query.shape[2], key.shape[2], start)
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=grouped)

    def attend_all(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """Full attention, no cache: the vision encoder's; `bias` [S, S] is added to the logits."""
        return F.scaled_dot_product_attention(query, key, value, bias)

    def attend_wide(
        self, query: Tensor, key: Tensor, value: Tensor, start: Tensor, end: Tensor
    ) -> Tensor:
        """As `attend`, with scores and softmax in float32."""
        return attention(query.float(), key.float(), value, start)

    def attend_all_wide(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """As `attend_all`, with scores and softmax in float32."""
        bias = None if bias is None else bias.float()
        return attention_to_all(query.float(), key.float(), value, bias)

    def last(self, x: Tensor) -> Tensor:
        """The last token: [1, S, width] -> [1, 1, width]."""
        return x[:, -1:]


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in a dtype; where it has it already nothing is traced."""
    return x if x.dtype == dtype else x.to(dtype)


def visible(new: int, slots: int, start: Tensor) -> Tensor:
    """Which cache slots each of `new` tokens sees, the first at slot `start`: bool [new, slots]."""
    rows = start + torch.arange(new, device=start.device)
    return torch.arange(slots, device=start.device)[None, :] <= rows[:, None]


def scores(query: Tensor, key: Tensor) -> Tensor:
    """Scaled products in the dtype of both; query heads that share a key stand below each other, so
    that no key is repeated: [b, heads, S, d], [b, kv_heads, n, d] -> [b, kv_heads, group * S, n].
    """
    batch, heads, new, size = query.shape
    kv_heads = key.shape[1]
    if heads != kv_heads:
        query = query.reshape(batch, kv_heads, heads // kv_heads * new, size)
    products: Tensor = (query * scalar(size**-0.5, query)) @ key.transpose(-1, -2)
    return products


def attention(query: Tensor, key: Tensor, value: Tensor, start: Tensor) -> Tensor:
    """TorchOps.attend from products and a softmax, scores in the dtype of query and key."""
    _, heads, new, size = query.shape
    seen = visible(new, key.shape[2], start)
    hidden = cast(torch.where(seen, 0.0, torch.finfo(query.dtype).min), query.dtype)  # [S, n]
    if heads != key.shape[1]:
        hidden = hidden.repeat(heads // key.shape[1], 1)
    weights = (scores(query, key) + hidden).softmax(-1)
    mixed: Tensor = cast(weights, value.dtype) @ value
    return mixed.reshape(1, heads, new, size)


def attention_to_all(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """TorchOps.attend_all from products and a softmax, scores in the dtype of query and key."""
    logits = scores(query, key)
    weights = (logits if bias is None else logits + bias).softmax(-1)
    mixed: Tensor = cast(weights, value.dtype) @ value
    return mixed
