"""One bundle that is served: its engine, its dialogues, and the thread that answers."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

from edgeprune.runtime.answer import Answer
from edgeprune.runtime.engine import Engine
from edgeprune.runtime.session import Session
from edgeprune.serve.dialogues import Dialogues
from edgeprune.serve.request import ChatRequest
from edgeprune.serve.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer."""

    prompt: int  # of all messages, visual tokens before pruning among them
    cached: int  # of these, what the caches held already
    completion: int
    visual: int  # visual tokens before pruning
    kept: tuple[int, ...]  # visual tokens that enter each layer


@dataclass(frozen=True, slots=True)
class Finished:
    """The last thing that an answer yields."""

    answer: Answer
    usage: Usage


class ServedBundle:
    """A bundle that is open; `answer` runs on the scheduler's thread."""

    def __init__(self, engine: Engine, sequences: int, queue: int) -> None:
        self.engine, self.manifest = engine, engine.manifest
        self.name = engine.manifest.name
        self.created = int(time.time())
        self.dialogues = Dialogues(engine, sequences)
        self.scheduler = Scheduler(sequences, queue, self.name)

    @classmethod
    def open(
        cls, path: Path, backend: str, threads: int | None, sequences: int, queue: int
    ) -> ServedBundle:
        """Open a bundle and run it once, so that the first answer is as fast as the next."""
        engine = Engine.open(path, backend, threads=threads)
        try:
            with Session(engine) as session:
                session.warm_up()
            _ = engine.prompter  # read now: it may be refused
        except BaseException:
            engine.close()
            raise
        return cls(engine, sequences, queue)

    def answer(self, request: ChatRequest) -> Generator[str | Finished, None, None]:
        """The pieces of an answer, and what it was. Left before its end, it frees its sequence."""
        conversation = request.conversation
        sampling = request.sampling(self.manifest.text.generation)
        opened = self.dialogues.open(conversation, sampling)
        session = opened.session
        try:
            yield from _stripped(opened.pieces)
            answer = session.answer
            assert answer is not None  # set when the pieces end
            usage = self._usage(session, answer, opened.cached)
        except BaseException:
            self.dialogues.drop(session)
            raise
        self.dialogues.keep(session, conversation.after(answer.text), answer)
        yield Finished(answer, usage)

    def close(self) -> None:
        """Stop answering and free everything."""
        self.scheduler.close()
        self.dialogues.close()
        self.engine.close()

    def _usage(self, session: Session, answer: Answer, cached: int) -> Usage:
        sequence, prune = session.sequence, self.manifest.prune
        said = len(answer.ids) - (answer.ids[-1] in self.manifest.text.eos_token_ids)
        return Usage(
            sequence.ids.size + len(sequence.pending) - said,
            cached,
            len(answer.ids),
            prune.visual_tokens,
            tuple(prune.counts),
        )


def _stripped(pieces: Iterator[str]) -> Iterator[str]:
    """Pieces without white space at both ends of the whole, as `Answer.text` is."""
    held, begun = "", False
    for piece in pieces:
        text = held + piece if begun else piece.lstrip()
        shown = text.rstrip()
        held, begun = text[len(shown) :], begun or bool(shown)
        yield shown
