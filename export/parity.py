"""Parity: an exported pair of graphs against the eager reference of the same policy, in float32.

Each sample is prefilled, decoded for two tokens and asked again on the same cache. Both engines go
through the model window by window, and after each layer their hidden states are compared, at the
end visual tokens and logits. Differences are within a tolerance, or the layer where they begin is
named. The indices that each site's survivors take must be the same. Where they are not, it may be a
tie: two engines round differently, and a choice between equals falls otherwise. Then the
reference's own layer makes the graph's choice where its input is off by no more than rounding, and
goes on with it (ties.py). Ties are counted and bounded.

A graph in half precision is compared as if it computed in float32, with a reference of the same
rounded weights: that proves structure and weights to the last digits. What rounding does to the
model is judged apart (precision.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from edgeprune.errors import ParityError
from edgeprune.export.dialogue import REPORT, Graphs, Played, WindowedGraph
from edgeprune.export.ties import TOLERANCE, Given, tie
from edgeprune.measured import ParityRecord
from edgeprune.models._activations import Activations, Kept
from edgeprune.models._dialogues import CALLS
from edgeprune.models._eager import Eager
from edgeprune.models._processor import Prompt
from edgeprune.models._stages import DialogueState, ImageState, Stages

MOST_TIES = 1 / 3
"""Of the samples, at most: a graph that chooses wrongly differs on more than this."""

FLOOR = 1e-6
"""Differences below this are rounding, wherever a fault begins."""

WEIGHTS = "check the checkpoint's weights for infinities, NaN and values that the dtype cannot hold"
"""What to do where numbers are not finite in float32."""

S = TypeVar("S", ImageState, DialogueState)
Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Pair(Generic[S]):
    """One sample in both engines, between two windows."""

    sample: int  # from 1
    played: Played
    state: S
    followed: bool = True  # False: a tie led the graph to where the reference cannot go


def check(
    graphs: Graphs,
    eager: Eager,
    prompts: Iterable[Prompt],
    report: Callable[[int, int], None] = lambda done, total: None,
) -> ParityRecord:
    """Compare graphs that compute in float32 with their reference; ParityError where they disagree.

    `report` is told how often a sample went through a stage in either engine, and how often it
    will.
    """
    prompts = list(prompts)
    compared = Comparison(eager.activations, len(prompts), eager.stages, report)
    images = enumerate(prompts, 1)
    pairs = (
        Pair(n, graphs.encode_image(prompt), ImageState((prompt.pixels,))) for n, prompt in images
    )
    seen = list(compared.through(graphs.vision, eager.vision, pairs).drain())

    def talks() -> Iterator[Pair[DialogueState]]:
        for prompt, pair in zip(prompts, seen, strict=True):
            given = prompt, pair.state.shown[0], pair.state.chosen[0]
            yield Pair(pair.sample, graphs.talk(*given), eager.decoder.begin(*given))

    compared.through(graphs.decoder, eager.decoder, talks()).close()
    ends = (stages.titles[-1] for stages in (eager.vision, eager.decoder))
    visual, logits = (compared.worst.get(title, 0.0) for title in ends)
    return ParityRecord(len(prompts), "", len(compared.ties), visual, logits, TOLERANCE)


class Comparison:
    """Takes samples through both engines; what was seen so far."""

    def __init__(
        self,
        activations: Activations,
        samples: int,
        stages: int,
        report: Callable[[int, int], None],
    ) -> None:
        self.worst = dict[str, float]()  # difference of all samples, by the stage's title
        self.ties = set[int]()  # samples
        self._keep, self._report = activations.keep, report
        self._samples, self._done, self._total = samples, 0, 2 * samples * stages

    @torch.no_grad()
    def through(
        self, graph: WindowedGraph, stages: Stages[S], pairs: Iterable[Pair[S]]
    ) -> Kept[Pair[S]]:
        """All samples through the encoder or the decoder: a window of the graph, then the same
        layers of the reference, then the next window."""
        kept = self._keep(pairs)
        for number, window in enumerate(stages.windows()):
            with graph.opened(number) as run:
                kept = self._keep(self._run(run, window, pair) for pair in kept.drain())
            with stages.loaded(window):
                kept = self._keep(self._compared(stages, window, pair) for pair in kept.drain())
        return kept

    def _run(self, run: Callable[[Played], Played], window: range, pair: Pair[S]) -> Pair[S]:
        """A sample that the graph takes through a window."""
        played = run(pair.played)
        self._tell(len(window))
        return replace(pair, played=played)

    def _tell(self, stages: int) -> None:
        self._done += stages
        self._report(self._done, self._total)

    def _compared(self, stages: Stages[S], window: range, pair: Pair[S]) -> Pair[S]:
        """A sample whose reference goes through a window after the graph did."""
        played = pair.played
        for at, stage in enumerate(window):
            if pair.followed:
                found = Given(played.shown[at], played.chosen[at])
                state = self._judged(stages, stage, pair, found, played.at(at))
                pair = replace(pair, state=state or pair.state, followed=state is not None)
            self._tell(1)
        return replace(pair, played=replace(played, shown=played.shown[-1:], chosen=()))

    def _judged(
        self, stages: Stages[S], stage: int, pair: Pair[S], found: Given, entered: Tensors
    ) -> S | None:
        """The reference after a stage, with the graph's choice where that is a tie; None where it
        cannot make it. ParityError where the two are apart."""
        before, title = pair.state, stages.titles[stage]
        after = stages.advance(stage, before)
        wanted, what = Given.of(after, before), stages.shows(stage)
        require_finite(wanted, "the eager reference in float32", what, title, pair.sample)
        require_finite(found, "the exported graph in float32", what, title, pair.sample)
        if found.keeps_as(wanted):
            apart = found.apart(wanted)
            if apart <= TOLERANCE:
                self.worst[title] = max(apart, self.worst.get(title, 0.0))
                return after
            if not stages.merges(stage):
                self.worst[title] = apart
                raise ParityError(
                    f"{self._differs(what, title, apart)}; nothing was written. {REPORT}"
                )
        fault = (
            self._differs(what, title, found.apart(wanted))
            if found.keeps_as(wanted)
            else f"the exported graph keeps other tokens than the eager reference in {title}"
        )
        self.ties.add(pair.sample)
        if len(self.ties) > MOST_TIES * self._samples:
            raise ParityError(_too_many(fault, len(self.ties), self._samples))
        explained = tie(stages, stage, before, after, found, entered)
        if explained is None:
            raise ParityError(f"{fault}; nothing was written. {REPORT}")
        return explained.state  # type: ignore[return-value]  # of the kind that the stages take

    def _differs(self, what: str, title: str, apart: float) -> str:
        """A difference of numbers, and the layer where it begins."""
        return (
            f"the exported graph's {what} differ from the eager reference by {apart:.2e}, at most"
            f" {TOLERANCE:g} is right; the difference begins in {self._begins(title, apart)}"
        )

    def _begins(self, title: str, apart: float) -> str:
        """The stage in which differences grow most, up to one."""
        growth, before = dict[str, float](), FLOOR
        for name, worst in (self.worst | {title: apart}).items():
            growth[name] = max(worst, FLOOR) / before
            before = max(worst, FLOOR)
        return max(growth, key=growth.__getitem__)


def require_finite(found: Given, engine: str, what: str, title: str, sample: int) -> None:
    """ParityError where an engine gave a number that is not finite."""
    for call, values in zip(CALLS, found.shown, strict=False):
        if not bool(values.isfinite().all()):
            of = f" of the {call}" if len(found.shown) > 1 else ""
            raise ParityError(
                f"{engine} gives {what}{of} that are not finite on sample {sample}, in {title};"
                f" nothing was written: {WEIGHTS}"
            )


def _too_many(fault: str, ties: int, samples: int) -> str:
    """More samples differ than ties may explain."""
    return (
        f"{fault} on {ties} of {samples} samples, and a tie may explain it on a third of them at"
        " most; nothing was written. Check more samples with --parity N, or report the model and"
        " the command"
    )
