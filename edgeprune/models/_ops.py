"""The operations that a graph dialect may lower in its own way; here in plain torch.

`TorchOps` is the eager reference. Every product with a weight, every norm and every attention of a
model is a call of it. A dialect of `edgeprune.export` subclasses it and replaces what it has a
better operator for. Queries, keys, values and caches are [1, heads, tokens, head]. A call writes
its S tokens into a cache at slot `start` and attends to the `end` = start + S that it then holds;
both are int64 [1].

In half precision a few parts of a model may stay in float32 (`Part.wide` of `_layers`). What their
operations then are is written here once, from operators that every dialect has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from edgeprune.models._delta_rule import gated_delta_rule


def scalar(value: float, like: Tensor) -> Tensor:
    """A number rounded to the dtype of `like`, to which it is applied: [].

    A graph holds it in float32 and rounds it by a Cast, so a float32 copy of the graph has the
    number itself and can be compared with a float32 model to the last digits.
    """
    return torch.tensor(value).to(like.dtype)


@dataclass(frozen=True)
class BidirectionalSpan:
    """A run of the S new tokens that all see each other: int64 [] each, the number of its first and
    of the one behind its last; equal where there is none."""

    first: Tensor
    end: Tensor
    windowed: bool  # whether a window hides from them what lies before it


@dataclass(frozen=True)
class BidirectionalImages:
    """Tokens of one image see each other: the image of each of the S new tokens, int64 [S], -1 for
    those of none."""

    of: Tensor

    def same_image(self, start: Tensor, slots: int) -> Tensor:
        """Whether two tokens are of one image, for n slots that new ones fill from `start` on:
        bool [S, n]."""
        own, last = self.of, torch.scalar_tensor(self.of.shape[0] - 1, dtype=torch.int64)
        new = torch.arange(slots, device=own.device) - start
        inside = new.minimum(last).maximum(torch.zeros_like(last))  # TensorRT clips no integers
        there = torch.where((new >= 0) & (new <= last), own.index_select(0, inside), -1)
        return (own[:, None] == there[None, :]) & (own >= 0)[:, None]


Bidirectional = BidirectionalSpan | BidirectionalImages
"""New tokens that see each other, later ones too."""


@dataclass(frozen=True)
class Causal:
    """New tokens see the slots of a cache up to their own, or to the last of their run."""

    start: Tensor  # int64 [1], the slot of the first new token
    end: Tensor  # int64 [1], how many slots are filled, the new tokens' among them
    window: int | None = None  # how many slots a token sees, its own the last; None: all up to it
    bidirectional: Bidirectional | None = None  # of the new tokens, those that all see each other

    @property
    def is_plain(self) -> bool:
        """Whether each token sees all slots up to its own, and no other."""
        return self.window is None and self.bidirectional is None

    def seen(self, query: Tensor, key: Tensor) -> Tensor:
        """Which of n slots each of S new tokens sees: bool [S, n]."""
        slots, new = key.shape[2], torch.arange(query.shape[2], device=query.device)
        rows = last = (self.start + new)[:, None]
        first, run = None if self.window is None else rows - self.window, self.bidirectional
        if isinstance(run, BidirectionalSpan):
            inside = ((new >= run.first) & (new < run.end))[:, None]
            last = torch.where(inside, self.start + run.end - 1, rows)
            if first is not None and not run.windowed:
                first = torch.where(inside, self.start + run.first - 1, first).minimum(first)
        columns = torch.arange(slots, device=query.device)[None, :]
        seen = columns <= last
        if isinstance(run, BidirectionalImages):
            seen = seen | run.same_image(self.start, slots)
        return seen if first is None else seen & (columns > first)

    def bias(self, query: Tensor, key: Tensor) -> Tensor:
        """The same as what is added to the logits of `scores`: [S, n], or of the query heads that
        share a key [group * S, n]."""
        seen, group = self.seen(query, key), query.shape[1] // key.shape[1]
        hidden = cast(torch.where(seen, 0.0, torch.finfo(query.dtype).min), query.dtype)
        return hidden if group == 1 else hidden.repeat(group, 1)


class TorchOps:
    """Plain torch, any shape, no assumption about tracing."""

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False
    ) -> Tensor:
        """x W + b, all of one dtype. W is [in, out], as MatMul reads it, or where `transposed`
        [out, in], as an embedding that is the output head too."""
        if transposed:
            return F.linear(x, weight, bias)
        product: Tensor = x @ weight
        return product if bias is None else product + bias

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """A layer norm over the last axis, in the dtype of `x`; its result has the weight's."""
        scaled = cast(weight, x.dtype), cast(bias, x.dtype)
        return cast(F.layer_norm(x, weight.shape, *scaled, eps), weight.dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / rms(x) * weight over the last axis, computed in float32, in the weight's dtype."""
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return weight * cast(scaled, weight.dtype)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
        """Rotary embedding, halves convention; positions int64 [batch, S], or [1, S] of all."""
        batch, rows = positions.shape[0], positions.flatten()
        half = cos.shape[1]
        at_cos, at_sin = (t.index_select(0, rows).view(batch, 1, -1, half) for t in (cos, sin))
        low, high = x[..., :half], x[..., half:]
        return torch.cat([low * at_cos - high * at_sin, high * at_cos + low * at_sin], dim=-1)

    def write(self, past: Tensor, new: Tensor, start: Tensor) -> Tensor:
        """The cache with `new` written at slot `start` (int64 [1])."""
        at = start + torch.arange(new.shape[2], device=new.device)
        return past.index_copy(2, at, new)

    def scatter(self, known: Tensor, indices: Tensor, new: Tensor) -> Tensor:
        """`known` with rows of the last axis replaced: of `new` [..., n], where `indices` int64
        [..., axes before the last] say."""
        return known.index_put(indices.unbind(-1), new)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Causal | Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Attention, whose products are multiplied by `scale` or by head ** -0.5.

        A `mask` says what the new tokens see of a cache, or is a bias [S, n] that is added to the
        logits; without one all see all. Query heads may share a key's.
        """
        grouped = query.shape[1] != key.shape[1]
        if isinstance(mask, Causal):
            mask = mask.seen(query, key)
        return F.scaled_dot_product_attention(
            query, key, value, mask, scale=scale, enable_gqa=grouped
        )

    def attend_wide(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Causal | Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """As `attend`, with scores and softmax in float32."""
        if isinstance(mask, Tensor):
            mask = mask.float()
        return attention(query.float(), key.float(), value, mask, scale)

    def attend_capped(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Causal | Tensor | None,
        scale: float | None,
        cap: float,
    ) -> Tensor:
        """As `attend`, with scores bent towards a cap: no engine's own attention does that."""
        return attention(query, key, value, mask, scale, cap)

    def delta_rule(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        decay: Tensor,
        beta: Tensor,
        state: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Linear attention by the gated delta rule, as `gated_delta_rule` has it."""
        return gated_delta_rule(query, key, value, decay, beta, state)

    def last(self, x: Tensor) -> Tensor:
        """The last token: [1, S, width] -> [1, 1, width]."""
        return x[:, -1:]


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in a dtype; where it has it already nothing is traced."""
    return x if x.dtype == dtype else x.to(dtype)


def capped(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap)."""
    return (x * scalar(1 / cap, x)).tanh() * scalar(cap, x)


def scores(query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
    """Scaled products in the dtype of both; query heads that share a key stand below each other, so
    that no key is repeated: [b, heads, S, d], [b, kv_heads, n, d] -> [b, kv_heads, group * S, n].
    """
    batch, heads, new, size = query.shape
    kv_heads = key.shape[1]
    if heads != kv_heads:
        query = query.reshape(batch, kv_heads, heads // kv_heads * new, size)
    products: Tensor = (
        query * scalar(size**-0.5 if scale is None else scale, query)
    ) @ key.transpose(-1, -2)
    return products


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Causal | Tensor | None = None,
    scale: float | None = None,
    cap: float | None = None,
) -> Tensor:
    """TorchOps.attend from products and a softmax, scores in the dtype of query and key."""
    cached = isinstance(mask, Causal)
    if isinstance(mask, Causal):
        mask = mask.bias(query, key)
    logits = scores(query, key, scale)
    logits = logits if cap is None else capped(logits, cap)
    weights = (logits if mask is None else logits + mask).softmax(-1)
    mixed: Tensor = cast(weights, value.dtype) @ value
    return mixed.reshape(query.shape) if cached else mixed
