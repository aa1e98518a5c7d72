"""One bundle that is served: its engine, its dialogues, and the thread that answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

from edgeprune import terminal
from edgeprune.errors import BackendError
from edgeprune.runtime.answer import Choice, Timings, TokenScore
from edgeprune.runtime.engine import Engine
from edgeprune.runtime.session import Session
from edgeprune.serve.details import details
from edgeprune.serve.dialogues import Dialogues, Opened
from edgeprune.serve.memory import Memory
from edgeprune.serve.request import ChatRequest
from edgeprune.serve.scheduler import Scheduler

Said = tuple[int, ...]
"""Tokens of an answer, without the end of the turn."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer."""

    prompt: int  # of all messages, visual tokens before pruning among them
    cached: int  # of these, what the caches held already
    completion: int
    visual: int  # visual tokens before pruning
    kept: tuple[int, ...]  # visual tokens that enter each layer


@dataclass(frozen=True, slots=True)
class Piece:
    """Text by which an answer grew; `scores` of its tokens, where they were asked for."""

    text: str
    scores: tuple[TokenScore, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The last thing that an answer yields: the whole of it."""

    text: str
    finish: str  # stop, length
    usage: Usage
    warnings: tuple[str, ...]
    choice: Choice | None  # where answers to choose from were given
    details: dict[str, Any]  # times and kept tokens, where they were asked for
    scores: tuple[TokenScore, ...] | None = None  # of all tokens, where they were asked for


Event = Piece | Finished
"""What answering yields: pieces, then the whole."""


class ServedBundle:
    """A bundle that is open; `answer` runs on the scheduler's thread."""

    def __init__(
        self,
        open_engine: Callable[[], Engine],
        sequences: int,
        queue: int,
        memory: Memory | None = None,
        size: int = 0,
        kept_bytes: int = 0,
    ) -> None:
        """`open_engine` is called again where the engine fails, or was closed to make room in
        `memory`, of which it takes `size` bytes."""
        self._open_engine, self._kept = open_engine, (sequences, kept_bytes)
        self._memory, self.size = memory or Memory(), size
        self.loaded = True
        try:
            with self._memory.using(self):
                self.engine = _warm(open_engine())
        except BaseException:
            self._memory.forget(self)
            raise
        self.manifest, self.name = self.engine.manifest, self.engine.manifest.name
        self.created, self.failure = int(time.time()), ""
        self.dialogues = Dialogues(self.engine, *self._kept)
        self.scheduler = Scheduler(sequences, queue, self.name, self._may_start)

    def models(self) -> dict[str, float | None]:
        """The names under which it answers, and at which ratio: NAME at the default, NAME@CR."""
        ratios = [setting.prune.cr for setting in self.manifest.ratios]
        return {self.name: None, **{f"{self.name}@{cr:g}": cr for cr in ratios}}

    def answer(self, request: ChatRequest) -> Generator[Event, None, None]:
        """The pieces of an answer, and what it was. Left before its end, it frees its sequence."""
        with ExitStack() as stack:
            with self.scheduler.outside_step():  # which waits while other bundles answer
                stack.enter_context(self._memory.using(self))
            yield from self._answer(request)

    def _answer(self, request: ChatRequest) -> Generator[Event, None, None]:
        if self.failure or not self.loaded:
            self._reopen()
        dialogues = self.dialogues
        try:
            opened = dialogues.open(request.conversation)
            try:
                whole = self._choose if request.choices else self._say
                finished, said = yield from whole(opened, request)
            except BaseException:
                dialogues.drop(opened.session)
                raise
        except (BackendError, MemoryError):
            self._check_engine()
            raise
        if said is None:
            dialogues.drop(opened.session)
        else:
            dialogues.keep(opened.session, request.conversation.after(finished.text), said)
        yield finished

    def close(self, *, finish: bool = False) -> None:
        """Stop answering, or `finish` what was asked first, and free everything."""
        self.scheduler.close(finish=finish)
        self._memory.forget(self)
        self.dialogues.close()
        self.engine.close()

    def unload(self) -> None:
        """Make room for another bundle; the next question opens this one again."""
        self.loaded = False
        self.dialogues.close()
        self.engine.close()

    def _may_start(self) -> bool:
        """Whether to begin one more answer beside others: not while another bundle waits."""
        return not self._memory.contended

    def _check_engine(self) -> None:
        """After a failure: open the engine again unless it runs on nothing. Dialogues that it was
        answering end, those that were kept are read again."""
        try:
            _warm(self.engine, close=False)
        except Exception as error:
            self.failure = f"the engine failed ({type(error).__name__})"
            terminal.note(f"edgeprune: {self.name}: {self.failure}; it is opened again")
            with suppress(Exception):  # told to whoever asks next
                self._reopen()

    def _reopen(self) -> None:
        self.dialogues.close()
        self.engine.close()
        self.engine = _warm(self._open_engine())
        self.manifest = self.engine.manifest
        self.dialogues = Dialogues(self.engine, *self._kept)
        self.failure, self.loaded = "", True

    def _say(
        self, opened: Opened, request: ChatRequest
    ) -> Generator[Piece, None, tuple[Finished, Said | None]]:
        """An answer as the model gives it; no tokens where the caches hold more than was said."""
        session, talk = opened.session, request.conversation
        sampling = request.sampling(self.manifest.text.generation)
        if opened.image is None:
            pieces = session.stream_follow_up(
                talk.prompt, sampling, request.answer_format, logprobs=request.logprobs
            )
        else:
            pieces = session.stream(
                opened.image,
                talk.prompt,
                sampling,
                talk.system,
                request.answer_format,
                logprobs=request.logprobs,
            )
        told = 0
        for text in _stripped(pieces):
            scores = session.scores[told:]
            told += len(scores)
            yield Piece(text, scores)
        answer = session.answer
        assert answer is not None  # set when the pieces end
        ended = answer.ids[-1] in self.manifest.text.eos_token_ids
        said = answer.ids[:-1] if ended else answer.ids
        usage = self._usage(opened, talk.cr, said, len(answer.ids))
        found = self._details(opened, request, answer.timings)
        told_all = None if request.logprobs is None else answer.scores
        finished = Finished(
            answer.text, answer.finish, usage, answer.warnings, None, found, told_all
        )
        return finished, said if ended or answer.finish == "length" else None

    def _choose(
        self, opened: Opened, request: ChatRequest
    ) -> Generator[Piece, None, tuple[Finished, Said | None]]:
        """The likeliest of the given answers."""
        session, talk, choices = opened.session, request.conversation, request.choices
        if opened.image is None:
            choice = session.choose_follow_up(talk.prompt, choices)
        else:
            choice = session.choose(opened.image, talk.prompt, choices, talk.system)
        yield Piece(choice.text)
        ended = len(choice.ids) + 1  # with the end of the turn
        usage = self._usage(opened, talk.cr, choice.ids, ended)
        found = self._details(opened, request, choice.timings)
        return Finished(choice.text, "stop", usage, choice.warnings, choice, found), choice.ids

    def _details(self, opened: Opened, request: ChatRequest, timings: Timings) -> dict[str, Any]:
        if not request.details:
            return {}
        timings.preprocess += opened.timings.preprocess
        timings.vision += opened.timings.vision
        images = request.conversation.images
        manifest = self.manifest.at(request.conversation.cr)
        return details(opened.session.sequence, manifest, images, timings)

    def _usage(self, opened: Opened, cr: float | None, said: Said, completion: int) -> Usage:
        """`said` are the tokens of the answer that the sequence has, read or pending."""
        sequence, prune = opened.session.sequence, self.manifest.at(cr).prune
        prompt = sequence.ids.size + len(sequence.pending) - len(said)
        return Usage(prompt, opened.cached, completion, prune.visual_tokens, tuple(prune.counts))


def _warm(engine: Engine, *, close: bool = True) -> Engine:
    """Run an engine once, so that the first answer is as fast as the next."""
    try:
        with Session(engine) as session:
            session.warm_up()
        _ = engine.prompter  # read now: it may be refused
    except BaseException:
        if close:
            engine.close()
        raise
    return engine


def _stripped(pieces: Iterator[str]) -> Iterator[str]:
    """Pieces without white space at both ends of the whole, as `Answer.text` is."""
    held, begun = "", False
    for piece in pieces:
        text = held + piece if begun else piece.lstrip()
        shown = text.rstrip()
        held, begun = text[len(shown) :], begun or bool(shown)
        yield shown
