"""A session: one bundle, one engine, a dialogue about one picture at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edgeprune.bundle import Bundle
from edgeprune.errors import CapacityError, InputError
from edgeprune.runtime import backends
from edgeprune.runtime.backend import Backend, Chunk, Ids, Output
from edgeprune.runtime.media import Shown, prepare
from edgeprune.runtime.sampling import Sampler, Sampling, StopWatcher
from edgeprune.runtime.text import Prompter

WARM_UP = 128
"""Text tokens of a prefill on nothing."""

BACKENDS = backends.NAMES


@dataclass
class Timings:
    """Milliseconds of one answer; `decode` has one entry per token after the first."""

    preprocess: float = 0.0
    vision: float = 0.0
    prefill: float = 0.0
    decode: list[float] = field(default_factory=list)

    @property
    def first_token(self) -> float:
        """Time to first token: preprocessing, vision and prefill."""
        return self.preprocess + self.vision + self.prefill


@dataclass(frozen=True)
class Answer:
    """What was said, and how: ids, why it ended (`stop`, `length`), times, kept visual tokens."""

    text: str
    ids: tuple[int, ...]
    finish: str
    timings: Timings
    vision_kept: Ids  # of the V tokens, those whose places the encoder's survivors took; V: [CLS]
    layer_kept: tuple[Ids, ...]  # at each site of the decoder likewise, of the ones alive there
    prompt_tokens: int
    remarks: tuple[str, ...] = ()  # of the picture, such as that its shape is not the bundle's


class Session:
    """Opens a bundle and answers questions; not for use from several threads at once.

    As a context manager it is closed at the end of the block.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle, self.backend = bundle, backend
        self.manifest = bundle.manifest
        self._prompter = Prompter(bundle.file("tokenizer.json"), self.manifest.text)
        self._counts = np.array(self.manifest.prune.counts)
        self._visual_ids = np.repeat(*np.array(self.manifest.text.visual_ids, np.int64).T)
        self._held = ExitStack()
        self._held.callback(backend.close)
        self.reset()

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        backend: str = "ort-cpu",
        threads: int | None = None,
        verify: bool | None = None,
    ) -> Session:
        """Open a bundle on one of BACKENDS; `verify` as in Bundle.open."""
        backends.check(backend)
        bundle = Bundle.open(path, verify=verify)
        return cls(bundle, backends.make(bundle, backend, threads))

    def close(self) -> None:
        """Free the engine and its memory at once; nothing can be asked any more."""
        self._held.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def reset(self) -> None:
        """Forget the picture and the dialogue."""
        self._lengths = np.zeros(self.manifest.decoder.layers, np.int64)
        self._position = 0
        self._ids: Ids = np.zeros(0, np.int64)  # the dialogue, as transformers has it
        self._pending: list[int] = []  # said, but not yet in the cache
        self._vision_kept: Ids = np.zeros(0, np.int64)
        self._layer_kept: tuple[Ids, ...] = ()
        self._remarks: tuple[str, ...] = ()
        self.answer: Answer | None = None

    @property
    def sampling(self) -> Sampling:
        """The checkpoint's own settings of generation, used where none are given."""
        return self.manifest.text.generation

    def warm_up(self) -> None:
        """Run both graphs once on nothing, so that the first answer is as fast as the next."""
        empty = np.zeros((1, 0), np.int64)
        self.backend.see(np.zeros(self.manifest.image.shape, np.float32))
        text = min(WARM_UP, (self.backend.text_capacity or 2 * WARM_UP) - 1)
        self._run(empty, np.zeros((1, text), np.int64), True)
        self._run(empty, np.zeros((1, 1), np.int64), False)
        self.reset()

    def ask(
        self,
        shown: Shown,
        prompt: str,
        sampling: Sampling | None = None,
        system: str | None = None,
    ) -> Answer:
        """Answer a question about a picture, or what else the bundle takes; a new dialogue.

        `system` is a system message in place of the chat template's own.
        """
        return self._last(self.stream(shown, prompt, sampling, system))

    def follow_up(self, prompt: str, sampling: Sampling | None = None) -> Answer:
        """Answer a further question about the same picture, on the same caches."""
        return self._last(self.stream_follow_up(prompt, sampling))

    def stream(
        self,
        shown: Shown,
        prompt: str,
        sampling: Sampling | None = None,
        system: str | None = None,
    ) -> Iterator[str]:
        """As `ask`, piece by piece; `answer` holds the whole once the last piece is out."""
        started = time.perf_counter()
        prefix_ids, text_ids = self._prompter.first_turn(prompt, system)  # refuse before any work
        prepared = prepare(shown, self.manifest.image)
        self.reset()
        self._remarks = prepared.remarks
        seen = time.perf_counter()
        timings = Timings(preprocess=1e3 * (seen - started))
        room = self._room(prefix_ids.shape[1] + text_ids.shape[1], self.manifest.span, sampling)
        self._vision_kept = self.backend.see(prepared.pixels)
        timings.vision = 1e3 * (time.perf_counter() - seen)
        return self._answer(prefix_ids, text_ids, True, sampling, room, timings)

    def stream_follow_up(self, prompt: str, sampling: Sampling | None = None) -> Iterator[str]:
        """As `follow_up`, piece by piece."""
        if self.answer is None:
            raise InputError("a follow-up needs a first answer: call ask with a picture before it")
        started = time.perf_counter()
        following = self._prompter.next_turn(prompt)
        text_ids = np.concatenate([np.array([self._pending], np.int64), following], axis=1)
        room = self._room(text_ids.shape[1], 0, sampling)
        timings = Timings(preprocess=1e3 * (time.perf_counter() - started))
        empty = np.zeros((1, 0), np.int64)
        return self._answer(empty, text_ids, False, sampling, room, timings)

    def _last(self, pieces: Iterator[str]) -> Answer:
        for _ in pieces:
            pass
        assert self.answer is not None  # set when the pieces end
        return self.answer

    def _room(self, text: int, span: int, sampling: Sampling | None) -> int:
        """How many tokens may be said after so much text, and a picture of `span` positions."""
        most = self.manifest.decoder.max_positions
        taken = self._position + text + span
        if taken >= most:
            raise CapacityError(
                f"the dialogue takes {taken} positions (the picture's included) and needs room for"
                f" an answer, the model has {most} positions; shorten the prompt"
            )
        room, left = most - taken, f"positions left of {most}"
        capacity = self.backend.text_capacity
        if capacity is not None:
            held = max(0, int(self._lengths[0] - self._counts[0])) + text
            if held >= capacity:
                raise CapacityError(
                    f"the dialogue has {held} tokens of text and needs room for an answer, the"
                    f" engines' caches hold {capacity}; shorten the prompt, or build with a larger"
                    " --text-capacity"
                )
            if capacity - held < room:
                room, left = capacity - held, f"tokens left of --text-capacity {capacity}"
        asked = sampling.max_new_tokens if sampling else None
        if asked is None:
            visual = self._visual_ids.size if span else 0
            return min(room, self._longest(sampling, self._ids.size + visual + text))
        if asked > room:
            raise CapacityError(
                f"--max-new-tokens {asked} is more than the {room} {left}; ask for fewer"
            )
        return asked

    def _longest(self, sampling: Sampling | None, before: int) -> int:
        """How many tokens an answer has at most where none was asked for; `before` stand first."""
        length = (sampling or self.sampling).max_length
        if self.sampling.max_new_tokens is not None or length is None:
            return self.sampling.max_new_tokens or 512
        if before >= length:
            raise CapacityError(
                f"the dialogue has {before} tokens (the image's included), max_length is {length};"
                " shorten the prompt, or ask for --max-new-tokens"
            )
        return length - before

    def _answer(
        self,
        prefix_ids: Ids,
        text_ids: Ids,
        with_picture: bool,
        sampling: Sampling | None,
        room: int,
        timings: Timings,
    ) -> Iterator[str]:
        sampling = sampling or self.sampling
        watcher, said = StopWatcher(sampling.stop), list[int]()
        tokens = self._tokens(prefix_ids, text_ids, with_picture, sampling, timings, said, room)
        text = ""
        for piece in self._prompter.pieces(tokens):
            if ready := watcher.feed(piece):
                text += ready
                yield ready
            if watcher.stopped:
                break
        if rest := watcher.finish():
            text += rest
            yield rest
        ended = watcher.stopped or len(said) < room or self._is_end(said)
        self.answer = Answer(
            text.strip(),
            tuple(said),
            "stop" if ended else "length",
            timings,
            self._vision_kept,
            self._layer_kept,
            prefix_ids.shape[1] + text_ids.shape[1],
            self._remarks,
        )

    def _is_end(self, said: list[int]) -> bool:
        return bool(said) and said[-1] in self.manifest.text.eos_token_ids

    def _tokens(
        self,
        prefix_ids: Ids,
        text_ids: Ids,
        with_picture: bool,
        sampling: Sampling,
        timings: Timings,
        said: list[int],
        room: int,
    ) -> Iterator[int]:
        """Ids of the answer as they are picked, the end token left out; fills `said`."""
        started = time.perf_counter()
        output = self._run(prefix_ids, text_ids, with_picture)
        if with_picture:
            self._layer_kept = output.kept
        timings.prefill = 1e3 * (time.perf_counter() - started)
        self._pending = []
        sampler = Sampler(sampling, self.manifest.text.eos_token_ids, self._ids.size)
        while True:
            known = sampler.takes_likeliest
            token = output.token if known else sampler.pick(output.logits, self._ids)
            said.append(token)
            if self._is_end(said):
                return
            self._pending = [token]
            yield token
            if len(said) == room:
                return
            started = time.perf_counter()
            output = self._run(np.zeros((1, 0), np.int64), np.array([[token]]), False)
            self._pending = []
            timings.decode.append(1e3 * (time.perf_counter() - started))

    def _run(self, prefix_ids: Ids, text_ids: Ids, with_picture: bool) -> Output:
        text = prefix_ids.shape[1] + text_ids.shape[1]
        visual = self._counts if with_picture else np.zeros_like(self._counts)
        after = self._lengths + text + visual
        self.backend.reserve(after.tolist())
        output = self.backend.run(
            Chunk(prefix_ids, text_ids, self._position, self._lengths, with_picture)
        )
        self._lengths = after
        shown = self._visual_ids if with_picture else self._visual_ids[:0]
        self._ids = np.concatenate([self._ids, prefix_ids[0], shown, text_ids[0]])
        self._position += text + (self.manifest.span if with_picture else 0)
        return output
