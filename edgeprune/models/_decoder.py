"""The decoder forward, written once: run eagerly it is the reference, traced it is decoder.onnx.

One call takes text before the image (P tokens), visual tokens (V) and text after it (T), any of
the first two possibly none: prefill has all three, decode has T = 1, a later turn has T = n.
Between layers where the plan's count falls, the policy picks which visual tokens go on; their
positions go with them. Every layer has its own cache and its own length. A layer without attention
keeps a state in place of keys and values, with linear attention two; a token that was dropped
before it never enters it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor, nn

from edgeprune.models._decoder_config import DecoderConfig, LayerConfig
from edgeprune.models._decoder_layer import Cache, DecoderLayer, Rotary
from edgeprune.models._expert_layer import ExpertLayer
from edgeprune.models._gated_delta_net import GatedDeltaNet
from edgeprune.models._kept_positions import image_at_one, kept_positions
from edgeprune.models._layers import Narrow, RMSNorm, Sum, WithBuffers
from edgeprune.models._mixer_layer import MixerLayer
from edgeprune.models._ops import (
    Bidirectional,
    BidirectionalImages,
    BidirectionalSpan,
    TorchOps,
    capped,
    cast,
)
from edgeprune.models._short_convolution import Convolution
from edgeprune.models._sites import Prune, PruneInput, live_stage
from edgeprune.policies import Policy
from edgeprune.policies._signals import (
    Anchors,
    AttentionStates,
    InputSignals,
    LayerSignals,
    Segments,
)
from edgeprune.spec import Plan


@dataclass(frozen=True)
class Flow:
    """A call between two layers: what goes on from one to the next."""

    hidden: Tensor  # [1, S, width]
    positions: Tensor  # int64 [1, S], rows of the rotary tables
    segments: Segments
    rotary: Rotary | None  # of this call; None: the decoder's own tables
    anchors: Anchors
    inputs: InputSignals
    lengths: Tensor  # int64 [layers], tokens in each layer's cache before the call
    filled: Tensor  # int64 [layers], and after it
    entered: int  # visual tokens that entered layer 1
    images: Tensor | None = None  # int64 [visual], where there are several, the image of each
    rows: tuple[Tensor, ...] = ()  # with DeepStack, of the layers to come, each [1, visual, width]
    counts: Tensor | None = None  # int64 [layers], where they are an input: as in `forward`


@dataclass(frozen=True)
class Advanced:
    """What one layer gives: the way on, its cache, and what a policy may look at in it."""

    flow: Flow
    cache: Cache
    signals: LayerSignals
    kept: tuple[Tensor, ...] = ()  # int64, indices of the survivors where tokens are dropped


class Decoder(WithBuffers):
    """A LLaMA-like decoder with a pruning policy built in."""

    def __init__(
        self, config: DecoderConfig, policy: Policy, plan: Plan, ops: TorchOps | None = None
    ) -> None:
        super().__init__()
        self.config, self.policy, self.plan = config, policy, plan
        self.ops = ops = ops or TorchOps()
        self.embedding = nn.Embedding(config.rows, config.width)
        self.layers = nn.ModuleList(layer_of(config, layer, ops) for layer in config.layers)
        self.norm = RMSNorm(config.width, config.eps, ops)
        self.deepstack = Sum() if config.deepstack else nn.Identity()
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
        for name in self._tables():
            self.register_buffer(name, torch.empty(0), persistent=False)

    def _tables(self) -> list[str]:
        """Names of the rotary tables: cosines and sines of each of the ropes."""
        endings = ["", *(f"_{number}" for number in range(1, len(self.config.ropes)))]
        return [name + ending for ending in endings for name in ("cos", "sin")]

    def compute_buffers(self, dtype: torch.dtype) -> None:
        """Compute the rotary tables in float32, as transformers does, then round them."""
        made = (rope.tables(self.config.max_positions) for rope in self.config.ropes)
        for name, table in zip(self._tables(), chain.from_iterable(made), strict=True):
            setattr(self, name, table.to(dtype))

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
        past: Sequence[Sequence[Tensor]],  # what each layer keeps, as `DecoderConfig.kept_shapes`
        visual_indices: Tensor | None = None,  # where `reads_indices`: int64 [V], among all V
        counts: Tensor | None = None,  # int64 [layers]: r_1 ... r_L in place of the plan's
    ) -> tuple[Tensor, list[tuple[Tensor, ...]], list[Tensor], list[Tensor]]:
        """Logits of the last token [1, 1, vocabulary], what each layer keeps now, kept positions,
        and hidden states before each layer and after the last."""
        ids = (prefix_ids, text_ids)
        flow, kept = self.enter(*ids, visual, position, lengths, visual_indices, counts)
        present, states = list[tuple[Tensor, ...]](), [flow.hidden]
        for index, before in enumerate(past):
            done = self.advance(index, flow, before)
            present.append(done.cache.kept)
            flow, kept = done.flow, [*kept, *done.kept]
            states.append(flow.hidden)
        return self.logits(flow.hidden), present, kept, states

    def enter(
        self,
        prefix_ids: Tensor,
        text_ids: Tensor,
        visual: Tensor,
        position: Tensor,
        lengths: Tensor,
        visual_indices: Tensor | None,
        counts: Tensor | None = None,
    ) -> tuple[Flow, list[Tensor]]:
        """A call before layer 1, and the kept positions where tokens are dropped by the text."""
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
        own = lengths.index_select(0, torch.arange(len(self.layers)))
        filled = own + self._new(segments, counts)
        entered, images = segments.visual, self._images(visual_indices, segments)
        held = (lengths, filled, entered, images, tuple(rows), counts)
        return Flow(hidden, positions, segments, rotary, anchors, inputs, *held), kept

    def advance(self, index: int, flow: Flow, past: Sequence[Tensor]) -> Advanced:
        """One layer, and what is dropped behind it; `past` is what it keeps of the calls before."""
        rotary = flow.rotary or self.own_rotary(index)
        start, end = (held[index : index + 1] for held in (flow.lengths, flow.filled))
        cache = Cache(tuple(past), start, end)
        given = flow.hidden, flow.positions, rotary, cache
        bidirectional = self.bidirectional(flow.segments, flow.entered, flow.images)
        hidden, present, seen = self.layers[index](*given, flow.segments, bidirectional)
        if flow.rows:
            hidden = self._stacked(hidden, flow.rows[0], flow.segments)
        signals = self._signals(index, flow, hidden, seen, rotary)
        flow = replace(flow, hidden=hidden, rows=flow.rows[1:])
        if str(index + 1) not in self.prune:
            return Advanced(flow, present, signals)
        flow, chosen = self._drop(index + 1, flow, signals)
        return Advanced(flow, present, signals, (chosen,))

    def _drop(self, index: int, flow: Flow, signals: LayerSignals) -> tuple[Flow, Tensor]:
        """What enters the layer of an index where the policy drops tokens before it."""
        site = self._site(index)
        alive = flow.entered if flow.counts is None else flow.segments.visual
        live = live_stage(site.stage, alive, flow.counts)
        hidden, positions, chosen = site(flow.hidden, flow.positions, signals, live)
        segments = Segments(flow.segments.prefix, live.survivors, flow.segments.text)
        if site.stage.renumber:
            positions = self._slots(flow.lengths[index : index + 1], segments)
        rows = tuple(map(chosen.gather, flow.rows))
        images = None if flow.images is None else flow.images.index_select(0, chosen.indices)
        held = {"positions": positions, "images": images, "rows": rows}
        return replace(flow, hidden=hidden, segments=segments, **held), chosen.indices

    def own_rotary(self, index: int) -> Rotary:
        """The tables of the layer of an index, whose rows are positions."""
        number = self.config.ropes.index(self.config.rope_of(index))
        cos, sin = (self.get_buffer(name) for name in self._tables()[2 * number :][:2])
        return Rotary(cos, sin)

    def bidirectional(
        self, segments: Segments, entered: int, images: Tensor | None = None
    ) -> Bidirectional | None:
        """The tokens of a call that see each other, later ones too; `entered` is how many visual
        tokens entered layer 1."""
        if self.config.sees == "past":
            return None
        if images is not None:
            before, after = (images.new_full((n,), -1) for n in (segments.prefix, segments.text))
            return BidirectionalImages(torch.cat([before, images, after]))
        sizes = segments.prefix, segments.visual, segments.total, entered
        prefix, visual, total, image = (torch.scalar_tensor(n, dtype=torch.int64) for n in sizes)
        if self.config.sees == "image":
            return BidirectionalSpan(prefix, prefix + visual, windowed=True)
        whole = total * image.minimum(torch.tensor(1))
        return BidirectionalSpan(torch.zeros_like(whole), whole, windowed=False)

    def _images(self, visual_indices: Tensor | None, segments: Segments) -> Tensor | None:
        """The image of each visual token, int64 [visual], where that says what it sees."""
        if not self.config.image_of or visual_indices is None:
            return None
        images = torch.tensor(self.config.image_of).index_select(0, visual_indices)
        # Once more, since the tracer does not know that there is an index for each visual token.
        return images.index_select(0, torch.arange(segments.visual, device=images.device))

    def _rows(self, visual: Tensor) -> Sequence[Tensor]:
        """Visual tokens, and the rows beside them, each [1, V, width]."""
        beside = self.config.deepstack
        return visual.chunk(1 + beside, dim=-1) if beside else (visual,)

    def _stacked(self, hidden: Tensor, row: Tensor, segments: Segments) -> Tensor:
        """Hidden states [1, S, width] with rows [1, V, width] added to their visual tokens."""
        start, end = segments.prefix, segments.prefix + segments.visual
        visual: Tensor = self.deepstack(hidden[:, start:end], row)
        before, after = (cast(part, visual.dtype) for part in (hidden[:, :start], hidden[:, end:]))
        return torch.cat([before, visual, after], dim=1)

    @property
    def span(self) -> int:
        """Positions that an image takes."""
        return self.config.span(self.plan)

    @property
    def reads_indices(self) -> bool:
        """Whether the graph asks which of the V its visual tokens are."""
        return self.places_tokens or bool(self.config.image_of)

    @property
    def places_tokens(self) -> bool:
        """Whether a visual token's position follows from its index among the V."""
        if self.config.one_position:
            return False
        return self.config.mrope is not None or self.plan.keeps_positions

    def _rotary(
        self, first: Tensor, segments: Segments, visual_indices: Tensor | None
    ) -> tuple[Rotary | None, Tensor, Anchors]:
        """Rotary tables if not the decoder's own, the row of each token in them [1, S], and those
        of the image's anchors."""
        mrope = self.config.mrope
        if self.config.one_position:
            positions = image_at_one(first, segments)
            rows = self.rows(positions, positions[-1:])[None]
            return None, rows, Anchors(*[self.rows(first + segments.prefix, positions[-1:])] * 3)
        if not self.places_tokens:
            last = first + segments.total - 1
            rows = self.rows(first + torch.arange(segments.total, device=first.device), last)
            start, count = self.rows(first + segments.prefix, last), segments.visual
            anchors = Anchors(start, start + count // 2, start + count - 1)
            return None, rows[None], anchors
        assert visual_indices is not None
        if mrope is None:
            positions = kept_positions(first, segments, visual_indices, self.span)
            rows = self.rows(positions, positions[segments.total - 1 : segments.total])
            anchors = Anchors(rows[-3:-2], rows[-2:-1], rows[-1:])
            return None, rows[None, :-3], anchors
        positions = mrope.positions(first, segments, visual_indices)
        positions = self.rows(positions, positions[0, segments.total - 1 : segments.total])
        own = self.own_rotary(0)
        rotary = Rotary(mrope.read(own.cos, positions), mrope.read(own.sin, positions))
        rows = torch.arange(segments.total + 3, device=first.device)  # of this call alone
        return rotary, rows[None, :-3], Anchors(rows[-3:-2], rows[-2:-1], rows[-1:])

    def _new(self, segments: Segments, counts: Tensor | None) -> Tensor:
        """How many tokens a call adds to each layer's cache: int64 [layers].

        In one piece, so that a GPU gets these sizes in one copy and not in one for each layer.
        """
        visual = torch.scalar_tensor(segments.visual, dtype=torch.int64)
        text = torch.scalar_tensor(segments.prefix + segments.text, dtype=torch.int64)
        counts = torch.tensor(self.plan.counts) if counts is None else counts
        return torch.minimum(counts, visual) + text

    def _slots(self, length: Tensor, segments: Segments) -> Tensor:
        """Rows of the rotary tables for tokens that stand where the cache holds them: [1, S]."""
        slots = length + torch.arange(segments.total, device=length.device)
        return self.rows(slots, length + segments.total - 1)[None]

    def _signals(
        self,
        index: int,  # of the layer just run
        flow: Flow,  # that entered it
        hidden: Tensor,  # [1, S, width], its output
        seen: AttentionStates | None,  # None: it has no attention
        rotary: Rotary,
    ) -> LayerSignals:
        """What a policy may look at after a layer."""
        return LayerSignals(
            segments=flow.segments,
            hidden=hidden,
            attention=seen,
            cos=rotary.cos,
            sin=rotary.sin,
            factor=self.config.rope_of(index).factor,
            scale=self.config.layers[index].scale,
            cap=self.config.layers[index].cap,
            past=self.config.sees != "prompt",
            rows=flow.positions[0],
            anchors=flow.anchors,
            visual_tokens=self.plan.counts[index],
            inputs=flow.inputs,
        )

    def _site(self, index: int) -> Prune:
        site = self.prune[str(index)]
        assert isinstance(site, Prune)  # ModuleDict forgets what it holds
        return site

    def logits(self, hidden: Tensor) -> Tensor:
        """[1, S, width] -> [1, 1, vocabulary]: only the last token reaches the output head."""
        last: Tensor = self.norm(self.ops.last(hidden))
        if self.config.head_apart:
            logits: Tensor = self.head(last[0])
        else:
            weight = self.embedding.weight if self.config.tied else self.head.weight
            logits = self.ops.linear(last[0], weight, transposed=True)
        cap = self.config.cap
        return (logits if cap is None else capped(logits, cap))[None]


def layer_of(config: DecoderConfig, layer: LayerConfig, ops: TorchOps) -> nn.Module:
    """The module of one layer."""
    if layer.linear:
        return MixerLayer("linear", GatedDeltaNet(config, layer, ops), config, layer, ops)
    if layer.kernel:
        return MixerLayer("convolution", Convolution(config, layer, ops), config, layer, ops)
    return (ExpertLayer if layer.experts else DecoderLayer)(config, layer, ops)
