"""A session: one engine, and one dialogue about one image at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from edgeprune.errors import CapacityError, InputError, SessionError
from edgeprune.manifest import Manifest
from edgeprune.runtime import backends
from edgeprune.runtime.answer import Answer, Choice, Timings, TokenScore, Turn
from edgeprune.runtime.answering import check_count, pieces
from edgeprune.runtime.backend import EncodedImage
from edgeprune.runtime.choosing import Choices
from edgeprune.runtime.engine import Engine
from edgeprune.runtime.formats import AnswerFormat, Grammar, check_settings
from edgeprune.runtime.media import Shown, prepare
from edgeprune.runtime.room import room
from edgeprune.runtime.sampling import Sampling
from edgeprune.runtime.sequence import NO_IDS, Sequence, at_its_ratio
from edgeprune.tiling import TILE_MEMORY_MB

WARM_UP = 128
"""Text tokens of a prefill on nothing, at most."""

BACKENDS = backends.NAMES


class Session:
    """Answers questions: an engine, and a sequence that holds the dialogue.

    It serves one caller. Two at once, from threads or in two streams, get a SessionError and never
    a wrong answer; each takes a session of its own, on one engine: `Session(engine)`. As a context
    manager a session is closed at the end of the block.
    """

    def __init__(
        self, engine: Engine, sequence: Sequence | None = None, cr: float | None = None
    ) -> None:
        """On an engine that the caller closes; `sequence` may be a fork of another one. `cr` is the
        ratio of questions that name none, None the bundle's default."""
        self.engine, self.bundle, self._cr = engine, engine.bundle, cr
        self.manifest = engine.manifest.at(cr)  # at the ratio of the dialogue
        self._prompter = engine.prompter
        self.sequence = sequence or engine.sequence()
        self.answer: Answer | None = None  # to the last question, once it is complete
        self._turn: Turn | None = None
        self._busy, self._owned = threading.Lock(), ExitStack()

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        backend: str = "ort-cpu",
        threads: int | None = None,
        verify: bool | None = None,
        cr: float | None = None,
        tile_memory_mb: int = TILE_MEMORY_MB,
    ) -> Session:
        """Open a bundle on one of BACKENDS, for one dialogue; `verify` as in Bundle.open, `cr` as
        in Session, `tile_memory_mb` as in Engine.open."""
        with ExitStack() as owned:
            engine = Engine.open(
                path, backend, threads=threads, verify=verify, tile_memory_mb=tile_memory_mb
            )
            owned.callback(engine.close)
            session = cls(engine, cr=cr)
            session._owned = owned.pop_all()
        return session

    def close(self) -> None:
        """Free the dialogue's memory at once, and the engine's if `open` opened it; nothing can be
        asked any more."""
        self.sequence.close()
        self._owned.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def reset(self) -> None:
        """Forget the image and the dialogue."""
        with self._alone():
            self._reset()

    @property
    def scores(self) -> tuple[TokenScore, ...]:
        """Of the answer as far as it is there, where `logprobs` asked for them."""
        return tuple(self._turn.scores) if self._turn else ()

    @property
    def sampling(self) -> Sampling:
        """The checkpoint's own settings of generation, used where none are given."""
        return self.manifest.text.generation

    def warm_up(self) -> None:
        """Run all graphs once on nothing, so that the first answer is as fast as the next."""
        with self._alone():
            self._reset()
            engine, manifest = self.engine, self.manifest
            image = engine.encode_pixels(np.zeros(manifest.image.shape, np.float32), cr=self._cr)
            most = manifest.decoder.max_positions - manifest.decoder.image_positions
            text = min(WARM_UP, (engine.backend.text_capacity or most) - 1, most - 1)
            if text >= 1:
                self.sequence.read(np.zeros((1, text), np.int64), image=image)
                self.sequence.read(np.zeros((1, 1), np.int64))
            self._reset()

    def ask(
        self,
        shown: Shown | EncodedImage,
        prompt: str,
        sampling: Sampling | None = None,
        system: str | None = None,
        answer_format: AnswerFormat | None = None,
        *,
        logprobs: int | None = None,
        cr: float | None = None,
    ) -> Answer:
        """Answer a question about an image, or what else the bundle takes; a new dialogue.

        `system` is a system message in place of the chat template's own; `answer_format` is the
        form that the answer has unless it ends with `length`. `logprobs` asks for the answer's
        `scores`, with so many of the likeliest tokens in each place. `cr` is one of the bundle's
        ratios, which the dialogue keeps; None: the session's own.
        """
        with self._alone():
            return self._whole(
                self._first_turn(shown, prompt, sampling, system, answer_format, logprobs, cr)
            )

    def follow_up(
        self,
        prompt: str,
        sampling: Sampling | None = None,
        answer_format: AnswerFormat | None = None,
        *,
        logprobs: int | None = None,
    ) -> Answer:
        """Answer a further question about the same image, on the same caches."""
        with self._alone():
            return self._whole(self._next_turn(prompt, sampling, answer_format, logprobs))

    def choose(
        self,
        shown: Shown | EncodedImage,
        prompt: str,
        choices: Collection[str],
        system: str | None = None,
        *,
        cr: float | None = None,
    ) -> Choice:
        """The likeliest of given answers to a question about an image, with the probability of
        each; a new dialogue, which goes on as if that answer had been given."""
        with self._alone():
            wanted = self._choices(choices)
            longest = Sampling(max_new_tokens=wanted.longest)
            return self._chosen(wanted, self._first_turn(shown, prompt, longest, system, cr=cr))

    def choose_follow_up(self, prompt: str, choices: Collection[str]) -> Choice:
        """As `choose`, for a further question about the same image."""
        with self._alone():
            wanted = self._choices(choices)
            longest = Sampling(max_new_tokens=wanted.longest)
            return self._chosen(wanted, self._next_turn(prompt, longest))

    def stream(
        self,
        shown: Shown | EncodedImage,
        prompt: str,
        sampling: Sampling | None = None,
        system: str | None = None,
        answer_format: AnswerFormat | None = None,
        *,
        logprobs: int | None = None,
        cr: float | None = None,
    ) -> Iterator[str]:
        """As `ask`, piece by piece; `answer` holds the whole once the last piece is out.

        A stream that is left before its end may be followed up; one that goes on after another
        question was asked is a SessionError.
        """
        with self._alone():
            turn = self._first_turn(shown, prompt, sampling, system, answer_format, logprobs, cr)
        return _Stream(self, turn)

    def stream_follow_up(
        self,
        prompt: str,
        sampling: Sampling | None = None,
        answer_format: AnswerFormat | None = None,
        *,
        logprobs: int | None = None,
    ) -> Iterator[str]:
        """As `follow_up`, piece by piece."""
        with self._alone():
            turn = self._next_turn(prompt, sampling, answer_format, logprobs)
        return _Stream(self, turn)

    def _reset(self) -> None:
        self.sequence.reset()
        self._turn, self.answer = None, None

    def _first_turn(
        self,
        shown: Shown | EncodedImage,
        prompt: str,
        sampling: Sampling | None,
        system: str | None,
        answer_format: AnswerFormat | None = None,
        logprobs: int | None = None,
        cr: float | None = None,
    ) -> Turn:
        """A question about an image, which is encoded; what is refused leaves all as it was."""
        clock, engine, manifest = time.perf_counter, self.engine, self._at(shown, cr)
        started = clock()
        prefix_ids, text_ids = self._prompter.first_turn(prompt, system)
        text = prefix_ids.size + text_ids.size
        most = room(self.sequence, text, sampling, manifest.decoder.image_positions)
        grammar = self._grammar(sampling, answer_format)
        check_count(logprobs, self.manifest.decoder.vocabulary)
        if isinstance(shown, EncodedImage):
            image, loaded = shown, clock()
        else:
            prepared = prepare(shown, self.manifest.image)
            loaded = clock()
            image = engine.encode_pixels(prepared.pixels, prepared.warnings, manifest.prune.cr)
        timings = Timings(1e3 * (loaded - started), 1e3 * (clock() - loaded))
        self._reset()
        self.manifest = manifest
        settings = sampling or self.sampling
        turn = Turn(prefix_ids, text_ids, image, text, settings, most, timings, grammar, logprobs)
        self._turn = turn
        return turn

    def _at(self, shown: Shown | EncodedImage, cr: float | None) -> Manifest:
        """The bundle at the ratio of a new dialogue: what is asked, or that of an encoded image."""
        wanted = self._cr if cr is None else cr
        if not isinstance(shown, EncodedImage):
            return self.engine.manifest.at(wanted)
        self.engine.check_own(shown)
        manifest = at_its_ratio(shown)
        if wanted is not None and wanted != manifest.prune.cr:
            raise SessionError(
                f"the image was encoded at CR {manifest.prune.cr:g}, the question asks for CR"
                f" {wanted:g}; encode it at that: Engine.encode_image"
            )
        return manifest

    def _next_turn(
        self,
        prompt: str,
        sampling: Sampling | None,
        answer_format: AnswerFormat | None = None,
        logprobs: int | None = None,
    ) -> Turn:
        sequence = self.sequence
        sequence.check()
        if not sequence.position:
            raise InputError("a follow-up needs a first answer: call ask with an image before it")
        started = time.perf_counter()
        text_ids = self._prompter.next_turn(prompt)
        text = len(sequence.pending) + text_ids.size
        most = room(sequence, text, sampling)
        grammar = self._grammar(sampling, answer_format)
        check_count(logprobs, self.manifest.decoder.vocabulary)
        timings = Timings(preprocess=1e3 * (time.perf_counter() - started))
        settings = sampling or self.sampling
        turn = Turn(NO_IDS, text_ids, None, text, settings, most, timings, grammar, logprobs)
        self._turn, self.answer = turn, None
        return turn

    def _grammar(self, sampling: Sampling | None, wanted: AnswerFormat | None) -> Grammar | None:
        if wanted is None:
            return None
        check_settings(sampling or self.sampling)
        return self._prompter.vocabulary.grammar(wanted)

    def _whole(self, turn: Turn) -> Answer:
        pieces = self._pieces(turn)
        while self._next(pieces) is not None:
            pass
        assert self.answer is not None  # set when the pieces end
        return self.answer

    def _choices(self, texts: Collection[str]) -> Choices:
        return Choices.of(texts, self._prompter, self.manifest.text.eos_token_ids)

    def _chosen(self, choices: Choices, turn: Turn) -> Choice:
        sequence, clock = self.sequence, time.perf_counter
        with self._breaking_off():
            started = clock()
            output = sequence.read(turn.text_ids, turn.prefix_ids, turn.image)
            read = clock()
            choice = choices.scored(sequence, output.logits, turn)
        turn.timings.prefill, turn.timings.score = 1e3 * (read - started), 1e3 * (clock() - read)
        sequence.pending = list(choice.ids)
        return choice

    def _next(self, pieces: Iterator[str]) -> str | None:
        """The next piece, None at the end."""
        with self._breaking_off():
            return next(pieces, None)

    @contextmanager
    def _breaking_off(self) -> Iterator[None]:
        """What breaks an answer off ends the dialogue too."""
        try:
            yield
        except (CapacityError, SessionError):  # nothing was run
            raise
        except BaseException as error:
            self.sequence.break_off(f"the last answer was broken off ({type(error).__name__})")
            raise

    def _pieces(self, turn: Turn) -> Iterator[str]:
        """The text of an answer as it grows; `answer` is set at its end."""
        self.answer = yield from pieces(self.sequence, turn)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise SessionError(
                "this session is answering another question; give each thread a session of its own"
                " on the same engine: Session(engine)"
            )
        try:
            yield
        finally:
            self._busy.release()


class _Stream:
    """The pieces of one answer, as they are asked for."""

    def __init__(self, session: Session, turn: Turn) -> None:
        self._session, self._turn, self._pieces = session, turn, session._pieces(turn)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        session = self._session
        with session._alone():
            if session._turn is not self._turn:
                raise SessionError(
                    "this stream ended when another question was asked in its session; streams"
                    " side by side take a session each, on one engine: Session(engine)"
                )
            piece = session._next(self._pieces)
        if piece is None:
            raise StopIteration
        return piece
