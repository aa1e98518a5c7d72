"""A model that runs on many samples with one decoder layer or encoder block in memory at a time.

A layer's weights are read from the checkpoint, all samples go through it, and it is let go. The
modules are those of `Reference`, which holds every layer: results are the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from edgeprune.models._activations import Activations, Kept
from edgeprune.models._adapter import Adapter
from edgeprune.models._decoder import Advanced, Flow
from edgeprune.models._decoder_layer import Cache
from edgeprune.models._ops import BidirectionalSpan
from edgeprune.models._processor import Prompt
from edgeprune.models._reference import ROOM
from edgeprune.models._streamed import Streamed
from edgeprune.models._vision_tower import Encoded, Encoding
from edgeprune.policies import Policy
from edgeprune.policies._signals import Segments
from edgeprune.spec import Plan

T = TypeVar("T")
BATCH = 8
"""Sequences whose caches are in memory at a time."""


@dataclass(frozen=True)
class Started:
    """One sample before the first decoder layer."""

    encoded: Encoded
    prefix_ids: Tensor  # int64 [1, P]
    text_ids: Tensor  # int64 [1, T]
    flow: Flow


@dataclass(frozen=True)
class _Seen:
    """One sample between two encoder blocks."""

    prefix_ids: Tensor
    text_ids: Tensor
    encoding: Encoding


class Layerwise:
    """Prefills of many prompts, layer by layer."""

    def __init__(
        self,
        adapter: Adapter,
        policy: Policy,
        plan: Plan,
        report: Callable[[int, int], None] = lambda done, total: None,
        *,
        dtype: torch.dtype = torch.float32,
        activations: Activations | None = None,
    ) -> None:
        """`report` is told how often a sample went through a block or layer, and how often it
        will."""
        with torch.device("meta"):
            self.vision, self.decoder = adapter.vision(policy, plan), adapter.decoder(policy, plan)
        self._vision = Streamed(adapter, self.vision, dtype)
        self._decoder = Streamed(adapter, self.decoder, dtype)
        self._activations, self._dtype = activations or Activations(), dtype
        self.execution = adapter.execution
        self._report, self._samples, self._done = report, 0, 0

    def start(self, prompts: Iterable[Prompt]) -> Iterator[Started]:
        """Each prompt through the encoder, block by block, and to the decoder's first layer.

        While one is looked at, all of the vision module but its blocks is in memory.
        """
        tower, merge = self.vision.encoder, self.vision.merge_in_encoder

        def step(number: int, seen: _Seen) -> _Seen:
            return replace(seen, encoding=tower.advance(number, seen.encoding, merge))

        with self.around_blocks():
            kept = self.keep(self.execution.run(self._seen, prompt) for prompt in prompts)
            kept = self.blocks(kept, step)
            with self._decoder.loaded("embedding"):
                for seen in kept.drain():
                    yield self.execution.run(self._started, seen)

    @contextmanager
    def around_blocks(self) -> Iterator[None]:
        """While this is open, all of the vision module but its blocks is in memory."""
        rest = [part for part in self._vision.parts if not part.startswith("encoder.blocks.")]
        with self._vision.loaded(*rest):
            yield

    def blocks(self, kept: Kept[T], step: Callable[[int, T], T]) -> Kept[T]:
        """As `layers`, of the encoder's blocks."""
        self._samples = len(kept)
        for index in range(len(self.vision.encoder.blocks)):
            with self._vision.loaded(f"encoder.blocks.{index}"):
                kept = self._each(kept, partial(step, index))
        return kept

    def layers(
        self,
        kept: Kept[T],
        step: Callable[[int, T], T],
        first: int = 0,
        finished: Callable[[int, Kept[T]], None] = lambda layers, kept: None,
    ) -> Kept[T]:
        """Values of all samples after each has gone through `step` with each layer's index, while
        that layer is in memory. The layers before the `first` were gone through earlier;
        `finished` is told after each how many layers are, and the values."""
        self._samples = len(kept)
        self._done = self._samples * (len(self.vision.encoder.blocks) + first)
        for index in range(first, len(self.decoder.layers)):
            with self._decoder.loaded(f"layers.{index}"):
                kept = self._each(kept, partial(step, index))
            finished(index + 1, kept)
        return kept

    def keep(self, values: Iterable[T]) -> Kept[T]:
        """Values of all samples, for `layers`."""
        return self._activations.keep(values)

    def advance(self, index: int, flow: Flow) -> Advanced:
        """One prefill through the layer that is in memory. Its cache is as large as `Reference`
        makes it, since attention rounds by the size of the cache."""
        text = flow.segments.prefix + flow.segments.text
        room = flow.segments.visual + max(text, ROOM)
        return self.decoder.advance(index, flow, self.empty_cache(index, 1, room))

    def continued(self, index: int, hidden: Tensor, rows: Tensor, segments: Segments) -> Tensor:
        """Sequences by themselves [n, S, width] through the layer that is in memory; `rows` int64
        [1, S] of the decoder's rotary tables."""
        count, length, _ = hidden.shape
        decoder, ends = self.decoder, (torch.tensor([0]), torch.tensor([length]))
        cache = Cache(self.empty_cache(index, count, length), *ends)
        given = hidden, rows, decoder.own_rotary(index), cache
        bidirectional = decoder.bidirectional(segments, entered=1)
        done: Tensor = decoder.layers[index](*given, segments, bidirectional)[0]
        return done

    def resumed(self, index: int, hidden: Tensor, flow: Flow, cache: Cache) -> Tensor:
        """Other values [n, S, width] of the last S tokens of a prefill, through the layer in
        memory. `flow` is what entered it, `cache` what `advance` made of that."""
        _, length, _ = hidden.shape
        decoder, segments = self.decoder, Segments(0, 0, length)
        bidirectional = decoder.bidirectional(segments, entered=1)
        if isinstance(bidirectional, BidirectionalSpan) and not bidirectional.windowed:
            first = length - cache.end[0]  # they see all of the prefill
            bidirectional = replace(bidirectional, first=first)
        given = flow.positions[:, -length:], flow.rotary or decoder.own_rotary(index)
        past, done = self._past(index, flow, cache, length), [hidden[:0]]
        for start in range(0, len(hidden), BATCH):
            part = hidden[start : start + BATCH]
            kept = tuple(one.expand(len(part), *one.shape[1:]) for one in past)
            held = Cache(kept, cache.end - length, cache.end)
            done.append(decoder.layers[index](part, *given, held, segments, bidirectional)[0])
        return torch.cat(done)

    def _past(self, index: int, flow: Flow, cache: Cache, length: int) -> tuple[Tensor, ...]:
        """What a layer keeps of a prefill's tokens before the last `length`: keys and values of all
        serve, a state is made anew of the tokens that it holds."""
        layer = self.decoder.config.layers[index]
        if not layer.kernel:
            return cache.kept
        before = flow.hidden[:, :-length]
        if layer.linear is None:  # else its state is made of all of them
            before = before[:, 1 - layer.kernel :]
        empty = Cache(self.empty_cache(index, 1, 0), cache.start, cache.start)
        rotary = flow.rotary or self.decoder.own_rotary(index)
        given = before, flow.positions[:, : before.shape[1]], rotary, empty, flow.segments
        present: Cache = self.decoder.layers[index](*given)[1]
        return present.kept

    def normed(self, values: Iterable[T]) -> Iterator[T]:
        """The values, while the decoder's final norm is in memory."""
        with self._decoder.loaded("norm"):
            yield from values

    def empty_cache(self, index: int, count: int, length: int) -> tuple[Tensor, ...]:
        """What the layer of an index keeps before a first call, for `count` sequences."""
        return self.decoder.config.nothing_kept(index, length, self._dtype, count)

    def _seen(self, prompt: Prompt) -> _Seen:
        encoding = self.vision.encoder.enter(prompt.pixels.to(self._dtype))
        return _Seen(prompt.prefix_ids, prompt.text_ids, encoding)

    def _started(self, seen: _Seen) -> Started:
        encoded = self.vision.encoder.leave(seen.encoding)
        visual, indices = self.vision.select(encoded)
        ids, zero = (seen.prefix_ids, seen.text_ids), torch.tensor([0])
        lengths = torch.zeros(len(self.decoder.layers), dtype=torch.int64)
        flow, _ = self.decoder.enter(*ids, visual, zero, lengths, indices)
        return Started(encoded, *ids, flow)

    def _each(self, kept: Kept[T], step: Callable[[T], T]) -> Kept[T]:
        run = partial(self.execution.run, step)
        return self._activations.keep(self._counted(map(run, kept.drain())))

    def _counted(self, values: Iterable[T]) -> Iterator[T]:
        blocks = len(self.vision.encoder.blocks) + len(self.decoder.layers)
        for value in values:
            yield value
            self._done += 1
            self._report(self._done, self._samples * blocks)
