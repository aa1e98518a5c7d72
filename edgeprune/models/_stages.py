"""Encoder and decoder as stages, some of which are in memory at a time.

The stages of each are what comes before the first layer, each layer, and what comes after the last.
A window is as many stages as fit in `WINDOW` bytes, at least one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, TypeVar

from torch import Tensor

from edgeprune.models._decoder import Decoder, Flow
from edgeprune.models._dialogues import Call, calls_about
from edgeprune.models._processor import Prompt
from edgeprune.models._reference import ROOM
from edgeprune.models._sites import Prune, PruneInput
from edgeprune.models._streamed import Streamed
from edgeprune.models._vision import Vision
from edgeprune.models._vision_tower import Encoding
from edgeprune.policies import Policy
from edgeprune.policies._policy import Selection
from edgeprune.policies._signals import InputSignals, LayerSignals
from edgeprune.spec import Stage

WINDOW = 256 << 20
"""Bytes of weights that a window of several stages has at most."""


@dataclass(frozen=True)
class ImageState:
    """An image between two stages of the encoder."""

    shown: tuple[Tensor, ...]  # pixels, hidden states [tiles, S, width], or visual tokens
    chosen: tuple[Tensor, ...] = ()  # int64 [r_1], once they are chosen
    encoding: Encoding | None = None


@dataclass(frozen=True)
class DialogueState:
    """A dialogue between two stages of the decoder."""

    calls: tuple[Call, ...]
    shown: tuple[Tensor, ...]  # of each call hidden states [1, S, width], or logits [vocabulary];
    # first the visual tokens
    chosen: tuple[Tensor, ...]  # the indices of the visual tokens, then each site's
    flows: tuple[Flow, ...] = ()


S = TypeVar("S", ImageState, DialogueState)


class Stages(ABC, Generic[S]):
    """Encoder or decoder, a stage at a time."""

    tower: str
    gives: str  # what the last stage gives, for people
    titles: tuple[str, ...]  # of the stages, for people
    loads: tuple[tuple[str, ...], ...]  # the parts that each needs

    def __init__(self, streamed: Streamed) -> None:
        self.streamed, self.execution = streamed, streamed.execution

    def advance(self, stage: int, state: S) -> S:
        """A sample through one stage, which is loaded; its tensors are in the host's memory."""
        return self.execution.run(partial(self.through, stage), state)

    @abstractmethod
    def through(self, stage: int, state: S) -> S:
        """As `advance`, of tensors that are where the model runs."""

    @abstractmethod
    def merges(self, stage: int) -> bool:
        """Whether equal indices of a stage's survivors, if it tells any, may stand for other
        numbers: tokens are merged, or leave an encoder that goes on."""

    @abstractmethod
    def nudged(self, state: S, change: Callable[[Tensor], Tensor]) -> S:
        """A state in which all that a prefill's next stage computes with is changed."""

    @abstractmethod
    def entered(self, state: S, hidden: Tensor) -> S:
        """A state between two layers with other hidden states of the prefill."""

    def follows(self, stage: int) -> bool:
        """Whether `forced` can make any choice of a stage."""
        return False

    def forced(self, stage: int, state: S, indices: Tensor) -> S:
        """As `advance`, with given survivors in place of what the policy chooses."""
        raise NotImplementedError

    def shows(self, stage: int) -> str:
        """What a stage gives, for people."""
        last = stage == len(self.titles) - 1
        return self.gives if last else "hidden states"

    def path(self, stage: int) -> str:
        """Of the module that a stage is, or the tower's `input` or `output`."""
        if stage in (0, len(self.titles) - 1):
            return f"{self.tower} {'output' if stage else 'input'}"
        return f"{self.tower}.{self.loads[stage][0]}"

    def windows(self) -> list[range]:
        """The stages that are in memory together."""
        return list(grouped((self.streamed.bytes(parts) for parts in self.loads), WINDOW))

    def loaded(self, stages: range) -> AbstractContextManager[None]:
        names = dict.fromkeys(part for stage in stages for part in self.loads[stage])
        return self.streamed.loaded(*names)


class VisionStages(Stages[ImageState]):
    """Pixels to visual tokens."""

    tower, gives = "vision", "visual tokens"

    def __init__(self, vision: Vision, streamed: Streamed) -> None:
        super().__init__(streamed)
        self.vision, blocks = vision, range(len(vision.encoder.blocks))
        names = [f"encoder.blocks.{number}" for number in blocks]
        rest = tuple(part for part in streamed.parts if part not in names)
        middle = tuple(f"vision blocks.{number}" for number in blocks)
        self.titles = ("the encoder's input", *middle, "the visual tokens")
        self.loads = (("encoder",), *((name,) for name in names), rest)

    def through(self, stage: int, state: ImageState) -> ImageState:
        tower, merge = self.vision.encoder, self.vision.merge_in_encoder
        if stage == 0:
            encoding = tower.enter(state.shown[0])
        elif stage <= len(tower.blocks):
            assert state.encoding is not None
            encoding = tower.advance(stage - 1, state.encoding, merge)
        else:
            assert state.encoding is not None
            visual, indices = self.vision.select(tower.leave(state.encoding))
            return ImageState((visual,), (indices,))
        return ImageState((encoding.hidden,), (), encoding)

    def merges(self, stage: int) -> bool:
        sites, site = self.vision.plan.before_decoder(), self.vision.encoder.site
        if stage == len(self.titles) - 1:
            return any(one.merged for one in sites)
        shortened = site is not None and stage == site.config.at + 1
        return stage > 0 and (shortened or any(one.site == "block" for one in sites))

    def nudged(self, state: ImageState, change: Callable[[Tensor], Tensor]) -> ImageState:
        seen = state.encoding
        if seen is None:
            return replace(state, shown=(change(state.shown[0]),))
        signals = seen.query, seen.key, seen.contrast
        query, key, contrast = (None if x is None else change(x) for x in signals)
        read, hidden = tuple(map(change, seen.read)), change(seen.hidden)
        changed = replace(seen, hidden=hidden, query=query, key=key, read=read, contrast=contrast)
        return replace(state, encoding=changed)

    def entered(self, state: ImageState, hidden: Tensor) -> ImageState:
        assert state.encoding is not None
        return replace(state, encoding=replace(state.encoding, hidden=hidden))


class DecoderStages(Stages[DialogueState]):
    """Visual tokens and text to logits."""

    tower, gives = "decoder", "logits"

    def __init__(self, decoder: Decoder, streamed: Streamed) -> None:
        super().__init__(streamed)
        self.decoder, layers = decoder, range(len(decoder.layers))
        middle = tuple(f"decoder layers.{number}" for number in layers)
        self.titles = ("the decoder's input", *middle, "the output head")
        head = "head" if "head" in streamed.parts else "embedding"
        self.loads = (("embedding",), *((f"layers.{n}",) for n in layers), ("norm", head))

    def begin(self, prompt: Prompt, visual: Tensor, indices: Tensor) -> DialogueState:
        """A dialogue about visual tokens [1, r_1, width] of these indices [r_1]."""
        return DialogueState(calls_about(prompt, self.decoder), (visual,), (indices,))

    def through(self, stage: int, state: DialogueState) -> DialogueState:
        if stage == 0:
            return self._enter(state)
        if stage <= len(self.decoder.layers):
            return self._layer(stage - 1, state)
        logits = (self.decoder.logits(flow.hidden)[0, 0] for flow in state.flows)
        return replace(state, shown=tuple(one.float() for one in logits), flows=())

    def merges(self, stage: int) -> bool:
        site = self._site(stage)
        return site is not None and site.stage.merged > 0

    def follows(self, stage: int) -> bool:
        return self._site(stage) is not None and not self.merges(stage)

    def forced(self, stage: int, state: DialogueState, indices: Tensor) -> DialogueState:
        site = self._site(stage)
        assert site is not None  # where `follows` says so
        policy = site.policy
        site.policy = Chosen(indices=self.execution.send(indices))
        try:
            return self.advance(stage, state)
        finally:
            site.policy = policy

    def _site(self, stage: int) -> Prune | PruneInput | None:
        """What drops tokens in a stage."""
        if stage == 0:
            return self.decoder.prune_input
        sites = dict(self.decoder.prune.items())
        site = sites.get(str(stage))
        assert site is None or isinstance(site, Prune)  # ModuleDict forgets what it holds
        return site

    def nudged(self, state: DialogueState, change: Callable[[Tensor], Tensor]) -> DialogueState:
        if not state.flows:
            return replace(state, shown=(change(state.shown[0]),))
        return self.entered(state, change(state.flows[0].hidden))

    def entered(self, state: DialogueState, hidden: Tensor) -> DialogueState:
        first, *later = state.flows
        return replace(state, flows=(replace(first, hidden=hidden), *later))

    def _enter(self, talk: DialogueState) -> DialogueState:
        (visual,), (indices,) = talk.shown, talk.chosen
        flows, chosen = list[Flow](), talk.chosen
        for call in talk.calls:
            given = call.position, call.lengths, indices
            flow, kept = self.decoder.enter(call.prefix_ids, call.text_ids, visual, *given)
            chosen = chosen if flows else (*chosen, *kept)
            flows.append(flow)
            visual, indices = visual[:, :0], indices[:0]  # the later calls have no image
        return DialogueState(talk.calls, tuple(flow.hidden for flow in flows), chosen, tuple(flows))

    def _layer(self, index: int, talk: DialogueState) -> DialogueState:
        config, flows, chosen = self.decoder.config, list[Flow](), talk.chosen
        text = sum(flow.segments.prefix + flow.segments.text for flow in talk.flows)
        length = self.decoder.plan.counts[index] + max(text, ROOM)
        kept = config.nothing_kept(index, length, self.streamed.dtype)
        for flow in talk.flows:
            done = self.decoder.advance(index, flow, kept)
            kept = done.cache.kept
            chosen = chosen if flows else (*chosen, *done.kept)
            flows.append(done.flow)
        return DialogueState(talk.calls, tuple(flow.hidden for flow in flows), chosen, tuple(flows))


@dataclass(frozen=True, kw_only=True)
class Chosen(Policy):
    """Keeps given tokens of an image."""

    indices: Tensor  # int64 [survivors]

    def layer(self, signals: LayerSignals, stage: Stage, live: Stage) -> Selection:
        return Selection(self.indices[: live.survivors])

    def input(self, signals: InputSignals, stage: Stage, live: Stage) -> Selection:
        return Selection(self.indices[: live.survivors])


def grouped(sizes: Iterable[int], bound: int) -> Iterator[range]:
    """Stages of these bytes in groups that follow each other, each within a bound or one alone."""
    start, held, count = 0, 0, 0
    for number, size in enumerate(sizes):
        if number > start and held + size > bound:
            yield range(start, number)
            start, held = number, 0
        held, count = held + size, number + 1
    yield range(start, count)
