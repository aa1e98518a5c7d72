"""The decoder forward, written once: run eagerly it is the reference, traced it is decoder.onnx.

One call takes text before the image (P tokens), visual tokens (V) and text after it (T), any of
the first two possibly none: prefill has all three, decode has T = 1, a later turn has T = n.
Between layers where the plan's count falls, the policy picks which visual tokens go on; their
positions go with them. Every layer has its own cache and its own length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgeprune.models._decoder_config import DecoderConfig, LayerConfig
from edgeprune.models._encoder import ACTIVATIONS
from edgeprune.models._kept_positions import kept_positions
from edgeprune.models._layers import (
    Linear,
    Narrow,
    Product,
    RMSNorm,
    Scores,
    Sum,
    WithBuffers,
    join_heads,
    split_heads,
)
from edgeprune.models._ops import Causal, TorchOps, cast
from edgeprune.models._sites import Prune, PruneInput, live_stage
from edgeprune.policies import Policy
from edgeprune.policies._signals import Anchors, InputSignals, LayerSignals, Segments
from edgeprune.spec import Plan


@dataclass(frozen=True)
class Rotary:
    """Tables [n, head / 2] in the graph's dtype; a token's position names its row."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class Cache:
    """Keys and values of one layer, [1, kv_heads, capacity, head]; int64 [1] each, how many tokens
    it holds before a call and after it."""

    key: Tensor
    value: Tensor
    start: Tensor
    end: Tensor


@dataclass(frozen=True)
class AttentionStates:
    """Queries and keys of one layer, [1, heads, S, head], before and after rotary embedding."""

    query: Tensor
    key: Tensor
    rotated_query: Tensor
    rotated_key: Tensor


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, layer: LayerConfig, ops: TorchOps) -> None:
        super().__init__()
        self.config = config
        inner, kv_inner = config.heads * config.head_size, config.kv_heads * config.head_size
        self.query = Narrow(config.width, inner, ops, layer.qkv_bias)
        self.key = Narrow(config.width, kv_inner, ops, layer.qkv_bias)
        self.value = Narrow(config.width, kv_inner, ops, layer.qkv_bias)
        self.output = Linear(inner, config.width, ops, layer.output_bias)
        norm = (config.head_size, config.eps, ops)
        self.query_norm = RMSNorm(*norm) if layer.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(*norm) if layer.qk_norm else nn.Identity()

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, [1, heads, S, head], no positions yet."""
        kv_heads = self.config.kv_heads
        return (
            self.query_norm(split_heads(self.query(x), self.config.heads)),
            self.key_norm(split_heads(self.key(x), kv_heads)),
            split_heads(self.value(x), kv_heads),
        )


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
        self.scores = Scores(ops, layer.scale)
        self.mlp_norm = RMSNorm(config.width, config.eps, ops)
        self.mlp = MLP(config, layer, ops)
        self.residual = Sum()

    def forward(
        self, hidden: Tensor, positions: Tensor, rotary: Rotary, cache: Cache
    ) -> tuple[Tensor, Cache, AttentionStates]:
        """Hidden [1, S, width] onwards, the cache written, and what a policy may look at."""
        ops = self.ops
        query, key, value = self.attention.project(self.attention_norm(hidden))
        rotated_query = ops.rotate(query, rotary.cos, rotary.sin, positions)
        rotated_key = ops.rotate(key, rotary.cos, rotary.sin, positions)
        keys = ops.write(cache.key, rotated_key, cache.start)
        values = ops.write(cache.value, value, cache.start)
        causal = Causal(cache.start, cache.end, self.window)
        mixed = self.scores(rotated_query, keys, values, causal)
        hidden = self.residual(hidden, self.attention.output(join_heads(mixed)))
        hidden = self.residual(hidden, self.mlp(self.mlp_norm(hidden)))
        seen = AttentionStates(query, key, rotated_query, rotated_key)
        return hidden, Cache(keys, values, cache.start, cache.end), seen


class Decoder(WithBuffers):
    """A LLaMA-like decoder with a pruning policy built in."""

    def __init__(
        self, config: DecoderConfig, policy: Policy, plan: Plan, ops: TorchOps | None = None
    ) -> None:
        super().__init__()
        self.config, self.policy, self.plan = config, policy, plan
        self.ops = ops = ops or TorchOps()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(DecoderLayer(config, layer, ops) for layer in config.layers)
        self.norm = RMSNorm(config.width, config.eps, ops)
        self.deepstack = Sum()
        if config.head_apart:
            self.head: nn.Linear | Narrow = Narrow(config.width, config.vocabulary, ops)
        elif not config.tied:
            self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        stage = plan.with_text()
        self.prune_input = (
            PruneInput(policy, stage, plan.encoded, config.tile_of) if stage else None
        )
        stages = {index: plan.entering_layer(index + 1) for index in range(1, len(config.layers))}
        self.prune = nn.ModuleDict({str(i): Prune(policy, s) for i, s in stages.items() if s})
        self.register_buffer("cos", torch.empty(0), persistent=False)
        self.register_buffer("sin", torch.empty(0), persistent=False)
        self.cos: Tensor
        self.sin: Tensor

    def compute_buffers(self, dtype: torch.dtype) -> None:
        """Compute the rotary tables in float32, as transformers does, then round them."""
        cos, sin = self.config.rope.tables(self.config.max_positions)
        self.cos, self.sin = cos.to(dtype), sin.to(dtype)

    def rows(self, positions: Tensor, last: Tensor) -> Tensor:
        """Rows of the rotary tables for the positions of a call that ends at `last`, [1]."""
        return self.config.rope.rows(positions, last, self.config.max_positions)

    def forward(
        self,
        prefix_ids: Tensor,  # int64 [1, P]
        visual: Tensor,  # [1, V, width], or with DeepStack [1, V, (1 + n) * width]
        text_ids: Tensor,  # int64 [1, T]
        position: Tensor,  # int64 [1], of the first token of this call
        lengths: Tensor,  # int64 [layers], tokens in each layer's cache
        past_keys: Sequence[Tensor],  # each [1, kv_heads, capacity_l, head]
        past_values: Sequence[Tensor],
        visual_indices: Tensor | None = None,  # where `places_tokens`: int64 [V], among all V
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        """Logits of the last token [1, 1, vocabulary], present keys, values, kept positions."""
        text, kept = self.embedding(text_ids), list[Tensor]()
        if self.prune_input is not None:
            visual, chosen = self.prune_input(visual, text)
            if visual_indices is not None:
                visual_indices = visual_indices.index_select(0, chosen)
            kept.append(chosen)
        visual, *rows = self._rows(visual)
        inputs = InputSignals(visual, self.plan.entering, text)
        hidden = torch.cat([self.embedding(prefix_ids), visual, text], dim=1)
        segments = Segments(prefix_ids.shape[1], visual.shape[1], text_ids.shape[1])
        rotary, positions, anchors = self._rotary(position, segments, visual_indices)
        # Through an index, which keeps the sum where the lengths are: sums of inputs and sizes are
        # moved to the CPU by ONNX Runtime, and each layer's part of them would be copied back.
        filled = lengths.index_select(0, torch.arange(len(self.layers))) + self._new(segments)
        entered, keys, values = segments.visual, list[Tensor](), list[Tensor]()
        signals: LayerSignals | None = None
        for index, layer in enumerate(self.layers):
            if signals is not None and str(index) in self.prune:
                site = self._site(index)
                live = live_stage(site.stage, entered)
                hidden, positions, chosen = site(hidden, positions, signals, live)
                segments = Segments(segments.prefix, live.survivors, segments.text)
                kept.append(chosen.indices)
                rows = list(map(chosen.gather, rows))
                if site.stage.renumber:
                    positions = self._slots(lengths[index : index + 1], segments)
            start, end = (held[index : index + 1] for held in (lengths, filled))
            cache = Cache(past_keys[index], past_values[index], start, end)
            hidden, present, seen = layer(hidden, positions, rotary, cache)
            keys.append(present.key)
            values.append(present.value)
            if rows:
                hidden = self._stacked(hidden, rows.pop(0), segments)
            signals = self._signals(
                index, segments, hidden, seen, rotary, positions[0], anchors, inputs
            )
            self.observe(index + 1, signals)
        return self.logits(hidden), keys, values, kept

    def _rows(self, visual: Tensor) -> Sequence[Tensor]:
        """Visual tokens, and the rows beside them, each [1, V, width]."""
        beside = self.config.deepstack
        return visual.chunk(1 + beside, dim=-1) if beside else (visual,)

    def _stacked(self, hidden: Tensor, row: Tensor, segments: Segments) -> Tensor:
        """Hidden states [1, S, width] with rows [1, V, width] added to their visual tokens."""
        start, end = segments.prefix, segments.prefix + segments.visual
        visual = self.deepstack(hidden[:, start:end], row)
        before, after = (cast(part, visual.dtype) for part in (hidden[:, :start], hidden[:, end:]))
        return torch.cat([before, visual, after], dim=1)

    @property
    def span(self) -> int:
        """Positions that an image takes."""
        mrope = self.config.mrope
        return self.plan.span if mrope is None else mrope.span

    @property
    def places_tokens(self) -> bool:
        """Whether a visual token's position follows from its index among the V."""
        return self.config.mrope is not None or self.plan.keeps_positions

    def _rotary(
        self, first: Tensor, segments: Segments, visual_indices: Tensor | None
    ) -> tuple[Rotary, Tensor, Anchors]:
        """Rotary tables, the row of each token in them [1, S], those of the image's anchors."""
        mrope = self.config.mrope
        if not self.places_tokens:
            last = first + segments.total - 1
            rows = self.rows(first + torch.arange(segments.total, device=first.device), last)
            start, count = self.rows(first + segments.prefix, last), segments.visual
            anchors = Anchors(start, start + count // 2, start + count - 1)
            return Rotary(self.cos, self.sin), rows[None], anchors
        assert visual_indices is not None
        if mrope is None:
            positions = kept_positions(first, segments, visual_indices, self.span)
            rows = self.rows(positions, positions[segments.total - 1 : segments.total])
            anchors = Anchors(rows[-3:-2], rows[-2:-1], rows[-1:])
            return Rotary(self.cos, self.sin), rows[None, :-3], anchors
        positions = mrope.positions(first, segments, visual_indices)
        positions = self.rows(positions, positions[0, segments.total - 1 : segments.total])
        rotary = Rotary(mrope.read(self.cos, positions), mrope.read(self.sin, positions))
        rows = torch.arange(segments.total + 3, device=first.device)  # of this call alone
        return rotary, rows[None, :-3], Anchors(rows[-3:-2], rows[-2:-1], rows[-1:])

    def _new(self, segments: Segments) -> Tensor:
        """How many tokens a call adds to each layer's cache: int64 [layers].

        In one piece, so that a GPU gets these sizes in one copy and not in one for each layer.
        """
        visual = torch.scalar_tensor(segments.visual, dtype=torch.int64)
        text = torch.scalar_tensor(segments.prefix + segments.text, dtype=torch.int64)
        return torch.minimum(torch.tensor(self.plan.counts), visual) + text

    def _slots(self, length: Tensor, segments: Segments) -> Tensor:
        """Rows of the rotary tables for tokens that stand where the cache holds them: [1, S]."""
        slots = length + torch.arange(segments.total, device=length.device)
        return self.rows(slots, length + segments.total - 1)[None]

    def _signals(
        self,
        index: int,  # of the layer just run
        segments: Segments,
        hidden: Tensor,  # [1, S, width]
        seen: AttentionStates,
        rotary: Rotary,
        rows: Tensor,  # [S]
        anchors: Anchors,
        inputs: InputSignals,
    ) -> LayerSignals:
        """What a policy may look at after a layer."""
        return LayerSignals(
            segments=segments,
            hidden=hidden,
            query=seen.query,
            key=seen.key,
            rotated_query=seen.rotated_query,
            rotated_key=seen.rotated_key,
            cos=rotary.cos,
            sin=rotary.sin,
            factor=self.config.rope.factor,
            scale=self.config.layers[index].scale,
            rows=rows,
            anchors=anchors,
            visual_tokens=self.plan.counts[index],
            inputs=inputs,
        )

    def _site(self, index: int) -> Prune:
        site = self.prune[str(index)]
        assert isinstance(site, Prune)  # ModuleDict forgets what it holds
        return site

    def observe(self, layer: int, signals: LayerSignals) -> None:
        """Called after each layer; calibration listens here."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[1, S, width] -> [1, 1, vocabulary]: only the last token reaches the output head."""
        last: Tensor = self.norm(self.ops.last(hidden))
        if self.config.head_apart:
            apart: Tensor = self.head(last[0])
            return apart[None]
        weight = self.embedding.weight if self.config.tied else self.head.weight
        return self.ops.linear(last[0], weight, transposed=True)[None]
