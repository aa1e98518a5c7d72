"""One layer of the decoder: attention over a cache, and an MLP.

A layer is called with the tokens of a call and its cache, and gives the tokens on and the cache
after the call.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from edgeprune.models._decoder_config import DecoderConfig, LayerConfig
from edgeprune.models._layers import (
    ACTIVATIONS,
    Linear,
    Narrow,
    Product,
    RMSNorm,
    Scores,
    Sum,
    join_heads,
    split_heads,
)
from edgeprune.models._ops import Bidirectional, Causal, TorchOps
from edgeprune.policies._signals import AttentionStates, Segments


@dataclass(frozen=True)
class Rotary:
    """Tables [n, head / 2] in the graph's dtype; a token's position names its row."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class Cache:
    """What one layer keeps: keys and values, [1, kv_heads, capacity, head] each, or a state.

    `start` and `end`, int64 [1] each, are how many tokens it holds before a call and after it.
    """

    kept: tuple[Tensor, ...]
    start: Tensor
    end: Tensor


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, layer: LayerConfig, ops: TorchOps) -> None:
        super().__init__()
        self.config = config
        inner, kv_inner = config.heads * config.head_size, config.kv_heads * config.head_size
        self.query = Narrow(config.width, inner, ops, layer.qkv_bias)
        self.key = Narrow(config.width, kv_inner, ops, layer.qkv_bias)
        self.value = Narrow(config.width, kv_inner, ops, layer.qkv_bias)
        self.output = Linear(inner, config.width, ops, layer.output_bias)
        norm = (config.head_size, config.branch_eps or config.eps, ops)
        self.query_norm = RMSNorm(*norm) if layer.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(*norm) if layer.qk_norm else nn.Identity()
        self.gate = Linear(config.width, inner, ops, layer.qkv_bias) if layer.output_gate else None
        self.product = Product() if layer.output_gate else nn.Identity()

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, [1, heads, S, head], no positions yet."""
        kv_heads = self.config.kv_heads
        return (
            self.query_norm(split_heads(self.query(x), self.config.heads)),
            self.key_norm(split_heads(self.key(x), kv_heads)),
            split_heads(self.value(x), kv_heads),
        )

    def gated(self, mixed: Tensor, x: Tensor) -> Tensor:
        """What attention gives, [n, S, heads * head], through the gate of the normed tokens."""
        if self.gate is None:
            return mixed
        found: Tensor = self.product(mixed, self.gate(x).sigmoid())
        return found


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig, layer: LayerConfig, ops: TorchOps) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[layer.activation]
        self.gate = Linear(config.width, config.mlp_width, ops, layer.mlp_bias)
        self.up = Linear(config.width, config.mlp_width, ops, layer.mlp_bias)
        self.product = Product()
        self.down = Linear(config.mlp_width, config.width, ops, layer.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down(self.product(self.activation(self.gate(x)), self.up(x)))
        return down


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig, layer: LayerConfig, ops: TorchOps) -> None:
        super().__init__()
        self.window, self.ops = layer.window, ops
        self.attention_norm = RMSNorm(config.width, config.eps, ops)
        self.attention = Attention(config, layer, ops)
        self.scores = Scores(ops, layer.scale, layer.cap)
        self.mlp_norm = RMSNorm(config.width, config.eps, ops)
        self.mlp = MLP(config, layer, ops)
        behind = (config.width, config.branch_eps or config.eps, ops)
        self.attention_out_norm = RMSNorm(*behind) if layer.branch_norms else nn.Identity()
        self.mlp_out_norm = RMSNorm(*behind) if layer.branch_norms else nn.Identity()
        self.residual = Sum()

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        rotary: Rotary,
        cache: Cache,
        segments: Segments,
        bidirectional: Bidirectional | None = None,
    ) -> tuple[Tensor, Cache, AttentionStates]:
        """Hidden [1, S, width] onwards, the cache written, and what a policy may look at."""
        ops = self.ops
        normed = self.attention_norm(hidden)
        query, key, value = self.project(normed, segments)
        rotated_query = ops.rotate(query, rotary.cos, rotary.sin, positions)
        rotated_key = ops.rotate(key, rotary.cos, rotary.sin, positions)
        past_keys, past_values = cache.kept
        keys = ops.write(past_keys, rotated_key, cache.start)
        values = ops.write(past_values, value, cache.start)
        causal = Causal(cache.start, cache.end, self.window, bidirectional)
        mixed = join_heads(self.scores(rotated_query, keys, values, causal))
        mixed = self.attention.gated(mixed, normed)
        branch = self.attention_out_norm(self.attended(mixed, segments))
        hidden = self.residual(hidden, branch)
        branch = self.mlp_out_norm(self.mapped(self.mlp_norm(hidden), segments))
        hidden = self.residual(hidden, branch)
        seen = AttentionStates(query, key, rotated_query, rotated_key)
        return hidden, Cache((keys, values), cache.start, cache.end), seen

    def project(self, x: Tensor, segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of the normed tokens."""
        return self.attention.project(x)

    def attended(self, x: Tensor, segments: Segments) -> Tensor:
        """The projection behind attention."""
        found: Tensor = self.attention.output(x)
        return found

    def mapped(self, x: Tensor, segments: Segments) -> Tensor:
        """The MLP of the normed tokens."""
        found: Tensor = self.mlp(x)
        return found
