"""Dialogues about many images in the eager model, with some of its layers in memory at a time.

A dialogue is a prefill, two decode steps and a second turn on one cache. The tokens of the later
calls are given, so all of them go through a layer together, and its cache is forgotten after that.
Encoder and decoder are each a row of stages: what comes before the first layer, each layer, and
what comes after the last. A window is as many stages as fit in `WINDOW` bytes, at least one. The
modules are those of `Reference`, and so are the numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from edgeprune.models._activations import Activations, Kept
from edgeprune.models._adapter import Adapter
from edgeprune.models._decoder import Decoder, Flow
from edgeprune.models._layers import Narrow, Part, parts, widen
from edgeprune.models._ops import TorchOps
from edgeprune.models._processor import Prompt
from edgeprune.models._reference import ROOM
from edgeprune.models._sites import Prune, PruneInput
from edgeprune.models._streamed import Streamed
from edgeprune.models._vision import Vision
from edgeprune.models._vision_tower import Encoding
from edgeprune.policies import Policy
from edgeprune.policies._policy import Selection
from edgeprune.policies._signals import InputSignals, LayerSignals
from edgeprune.spec import Plan, Stage

CALLS = ("prefill", "first decode step", "second decode step", "second turn")

WINDOW = 256 << 20
"""Bytes of weights that a window of several stages has at most."""


@dataclass(frozen=True)
class Call:
    """The text of one call of a dialogue, and what stands before it in the caches."""

    prefix_ids: Tensor  # int64 [1, P]
    text_ids: Tensor  # int64 [1, T]
    position: Tensor  # int64 [1]
    lengths: Tensor  # int64 [layers]


def calls_about(prompt: Prompt, decoder: Decoder) -> tuple[Call, ...]:
    """A sample's dialogue: its first token is decoded, then its last, then it is asked again."""
    counts = torch.tensor(decoder.plan.counts)
    position, lengths, found = 0, torch.zeros_like(counts), list[Call]()
    nothing, text = prompt.text_ids[:, :0], prompt.text_ids
    turns = [(prompt.prefix_ids, text)]
    turns += [(nothing, ids) for ids in (text[:, :1], text[:, -1:], text)]
    for number, (before, after) in enumerate(turns):
        found.append(Call(before, after, torch.tensor([position]), lengths))
        new = before.shape[1] + after.shape[1]
        position += new if number else new + decoder.span
        lengths = lengths + (new if number else new + counts)
    return tuple(found)


@dataclass(frozen=True)
class Outcome:
    """What one engine makes of a sample."""

    kept: tuple[Tensor, ...]  # indices of the survivors: the encoder's, then each site's
    visual: Tensor  # [1, r_1, width], between the graphs
    logits: tuple[Tensor, ...]  # float32 [vocabulary], of each of CALLS

    def survivors(self) -> list[set[int]]:
        """Indices in the image of the tokens that survive each site, the encoder first."""
        alive, *later = self.kept
        survivors = [alive]
        for kept in later:
            survivors.append(survivors[-1][kept])
        return [set(indices.tolist()) for indices in survivors]

    def not_finite(self) -> str:
        """Where the first infinity or NaN is; empty where every number is finite."""
        if not bool(self.visual.isfinite().all()):
            return "visual tokens"
        calls = zip(CALLS, self.logits, strict=True)
        return next((f"logits of the {c}" for c, v in calls if not bool(v.isfinite().all())), "")


@dataclass(frozen=True)
class Seen:
    """An image between two stages of the encoder."""

    shown: tuple[Tensor, ...]  # pixels, hidden states [tiles, S, width], or visual tokens
    chosen: tuple[Tensor, ...] = ()  # int64 [r_1], once they are chosen
    encoding: Encoding | None = None


@dataclass(frozen=True)
class Talk:
    """A dialogue between two stages of the decoder."""

    calls: tuple[Call, ...]
    shown: tuple[Tensor, ...]  # of each call hidden states [1, S, width], or logits [vocabulary];
    # first the visual tokens
    chosen: tuple[Tensor, ...]  # the indices of the visual tokens, then each site's
    flows: tuple[Flow, ...] = ()


S = TypeVar("S", Seen, Talk)


class Stages(ABC, Generic[S]):
    """Encoder or decoder, a stage at a time."""

    tower: str
    gives: str  # what the last stage does
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


class VisionStages(Stages[Seen]):
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

    def through(self, stage: int, state: Seen) -> Seen:
        tower, merge = self.vision.encoder, self.vision.merge_in_encoder
        if stage == 0:
            encoding = tower.enter(state.shown[0])
        elif stage <= len(tower.blocks):
            assert state.encoding is not None
            encoding = tower.advance(stage - 1, state.encoding, merge)
        else:
            assert state.encoding is not None
            visual, indices = self.vision.select(tower.leave(state.encoding))
            return Seen((visual,), (indices,))
        return Seen((encoding.hidden,), (), encoding)

    def merges(self, stage: int) -> bool:
        sites, site = self.vision.plan.before_decoder(), self.vision.encoder.site
        if stage == len(self.titles) - 1:
            return any(one.merged for one in sites)
        shortened = site is not None and stage == site.config.at + 1
        return stage > 0 and (shortened or any(one.site == "block" for one in sites))

    def nudged(self, state: Seen, change: Callable[[Tensor], Tensor]) -> Seen:
        seen = state.encoding
        if seen is None:
            return replace(state, shown=(change(state.shown[0]),))
        signals = seen.query, seen.key, seen.contrast
        query, key, contrast = (None if x is None else change(x) for x in signals)
        read, hidden = tuple(map(change, seen.read)), change(seen.hidden)
        changed = replace(seen, hidden=hidden, query=query, key=key, read=read, contrast=contrast)
        return replace(state, encoding=changed)

    def entered(self, state: Seen, hidden: Tensor) -> Seen:
        assert state.encoding is not None
        return replace(state, encoding=replace(state.encoding, hidden=hidden))


class DecoderStages(Stages[Talk]):
    """Visual tokens and text to logits."""

    tower, gives = "decoder", "logits"

    def __init__(self, decoder: Decoder, streamed: Streamed) -> None:
        super().__init__(streamed)
        self.decoder, layers = decoder, range(len(decoder.layers))
        middle = tuple(f"decoder layers.{number}" for number in layers)
        self.titles = ("the decoder's input", *middle, "the output head")
        head = "head" if "head" in streamed.parts else "embedding"
        self.loads = (("embedding",), *((f"layers.{n}",) for n in layers), ("norm", head))

    def begin(self, prompt: Prompt, visual: Tensor, indices: Tensor) -> Talk:
        """A dialogue about visual tokens [1, r_1, width] of these indices [r_1]."""
        return Talk(calls_about(prompt, self.decoder), (visual,), (indices,))

    def through(self, stage: int, state: Talk) -> Talk:
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

    def forced(self, stage: int, state: Talk, indices: Tensor) -> Talk:
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

    def nudged(self, state: Talk, change: Callable[[Tensor], Tensor]) -> Talk:
        if not state.flows:
            return replace(state, shown=(change(state.shown[0]),))
        return self.entered(state, change(state.flows[0].hidden))

    def entered(self, state: Talk, hidden: Tensor) -> Talk:
        first, *later = state.flows
        return replace(state, flows=(replace(first, hidden=hidden), *later))

    def _enter(self, talk: Talk) -> Talk:
        (visual,), (indices,) = talk.shown, talk.chosen
        flows, chosen = list[Flow](), talk.chosen
        for call in talk.calls:
            given = call.position, call.lengths, indices
            flow, kept = self.decoder.enter(call.prefix_ids, call.text_ids, visual, *given)
            chosen = chosen if flows else (*chosen, *kept)
            flows.append(flow)
            visual, indices = visual[:, :0], indices[:0]  # the later calls have no image
        return Talk(talk.calls, tuple(flow.hidden for flow in flows), chosen, tuple(flows))

    def _layer(self, index: int, talk: Talk) -> Talk:
        config, flows, chosen = self.decoder.config, list[Flow](), talk.chosen
        text = sum(flow.segments.prefix + flow.segments.text for flow in talk.flows)
        length = self.decoder.plan.counts[index] + max(text, ROOM)
        kept = config.nothing_kept(index, length, self.streamed.dtype)
        for flow in talk.flows:
            done = self.decoder.advance(index, flow, kept)
            kept = done.cache.kept
            chosen = chosen if flows else (*chosen, *done.kept)
            flows.append(done.flow)
        return Talk(talk.calls, tuple(flow.hidden for flow in flows), chosen, tuple(flows))


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


Around = Callable[[str, int], AbstractContextManager[object]]
"""Told the path of a stage and the number of the sample, from 1: open while it goes through it."""


class Eager:
    """The eager model in some dtype, for dialogues about many images."""

    def __init__(
        self,
        adapter: Adapter,
        policy: Policy,
        plan: Plan,
        dtype: torch.dtype = torch.float32,
        *,
        held: torch.dtype | None = None,
        ops: TorchOps | None = None,
        wide: Collection[str] = (),
    ) -> None:
        """`held`: float32 with weights and tables rounded to this dtype. `wide`: paths of the parts
        that compute in float32."""
        with torch.device("meta"):
            vision, decoder = adapter.vision(policy, plan, ops), adapter.decoder(policy, plan, ops)
        self.plan, self.dtype = plan, dtype
        self.vision = VisionStages(vision, Streamed(adapter, vision, dtype, held=held))
        self.decoder = DecoderStages(decoder, Streamed(adapter, decoder, dtype, held=held))
        self.activations = Activations()
        self.widen(wide)

    @property
    def parts(self) -> dict[str, Part]:
        """What may stay in float32, by path, in the order of the model."""
        return parts("vision", self.vision.vision) | parts("decoder", self.decoder.decoder)

    def is_narrow(self, path: str) -> bool:
        """Whether a module computes what is held in the model's dtype, as in a cache."""
        tower, _, rest = path.partition(".")
        owner = {"vision": self.vision.vision, "decoder": self.decoder.decoder}.get(tower)
        return owner is not None and isinstance(owner.get_submodule(rest), Narrow)

    def widen(self, paths: Collection[str]) -> None:
        """Let the parts of these paths compute in float32."""
        widen("vision", self.vision.vision, paths)
        widen("decoder", self.decoder.decoder, paths)

    @property
    def stages(self) -> int:
        """How many stages a sample goes through."""
        return len(self.vision.titles) + len(self.decoder.titles)

    def begin(self, prompts: Iterable[Prompt]) -> Kept[Seen]:
        """Images before the encoder."""
        return self.activations.keep(Seen((p.pixels.to(self.dtype),)) for p in prompts)

    @torch.no_grad()
    def outcomes(
        self,
        prompts: Sequence[Prompt],
        report: Callable[[int, int], None] = lambda done, total: None,
        around: Around = lambda stage, number: nullcontext(),
    ) -> list[Outcome]:
        """What the model makes of samples; `report` is told how often a sample went through a
        stage, and how often it will."""
        ticks, total = 0, len(prompts) * self.stages

        def run(stages: Stages[S], kept: Kept[S]) -> Kept[S]:
            nonlocal ticks
            for window in stages.windows():
                with stages.loaded(window):
                    kept = self.activations.keep(
                        through(stages, window, number, state)
                        for number, state in enumerate(kept.drain(), 1)
                    )
            return kept

        def through(stages: Stages[S], window: range, number: int, state: S) -> S:
            nonlocal ticks
            for stage in window:
                with around(stages.path(stage), number):
                    state = stages.advance(stage, state)
                ticks += 1
                report(ticks, total)
            return state

        seen = list(run(self.vision, self.begin(prompts)).drain())
        pairs = zip(prompts, seen, strict=True)
        talks = [self.decoder.begin(p, one.shown[0], one.chosen[0]) for p, one in pairs]
        said = run(self.decoder, self.activations.keep(talks)).drain()
        pairs_of = zip(seen, said, strict=True)
        return [Outcome(talk.chosen, one.shown[0], talk.shown) for one, talk in pairs_of]
