"""A sequence: one dialogue's caches on an engine, and where in it the next token stands."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.errors import CapacityError, InputError, SessionError
from edgeprune.manifest import Manifest
from edgeprune.runtime.backend import Caches, DecoderInputs, EncodedImage, Ids, Output

if TYPE_CHECKING:
    from edgeprune.runtime.engine import Engine

CLOSED = "this dialogue is closed; open another one"

NO_IDS: Ids = np.zeros((1, 0), np.int64)


def at_its_ratio(image: EncodedImage) -> Manifest:
    """The bundle's manifest at the ratio of an image that an engine encoded."""
    assert image.manifest is not None
    return image.manifest


def counts_of(image: EncodedImage) -> Ids:
    """r_1 ... r_L of an image: int64 [layers]."""
    return np.array(at_its_ratio(image).prune.counts)


@dataclass(frozen=True)
class _State:
    """What the caches hold; replaced as a whole once a call has succeeded."""

    lengths: Ids  # [layers]
    ids: Ids = field(default_factory=lambda: np.zeros(0, np.int64))
    position: int = 0
    text: int = 0  # tokens of text among them
    image: Manifest | None = None  # of the bundle, at the ratio of the image that was read
    vision_kept: Ids = field(default_factory=lambda: np.zeros(0, np.int64))
    layer_kept: tuple[Ids, ...] = ()
    warnings: tuple[str, ...] = ()


class Sequence:
    """One dialogue, owned by one caller at a time; made by `Engine.sequence`."""

    def __init__(self, engine: Engine, caches: Caches) -> None:
        self.engine, self._caches = engine, caches
        self._nothing = np.zeros(engine.manifest.decoder.layers, np.int64)
        self._visual_ids = engine.visual_ids
        self._busy, self._closed, self._broken = threading.Lock(), False, ""
        self._state = _State(self._nothing)
        self.pending: list[int] = []  # tokens that were said but not read yet; `read` takes them

    def reset(self) -> None:
        """Forget all tokens, also after a broken-off call; the caches keep their memory."""
        with self._alone():
            self._state, self.pending = _State(self._nothing), []
            self._broken = ""

    @property
    def position(self) -> int:
        """Of the next token; 0 where nothing has been read."""
        return self._state.position

    @property
    def ids(self) -> Ids:
        """All tokens that were read, as transformers has them, those of images included: [n]."""
        return self._state.ids

    @property
    def text_tokens(self) -> int:
        """Tokens of text in the caches."""
        return self._state.text

    @property
    def vision_kept(self) -> Ids:
        """Indices of the encoder's survivors among the image's V tokens."""
        return self._state.vision_kept

    @property
    def layer_kept(self) -> tuple[Ids, ...]:
        """At each pruning site of the decoder likewise, of the tokens alive there."""
        return self._state.layer_kept

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was done to the image that was read."""
        return self._state.warnings

    def read(
        self,
        text_ids: Ids = NO_IDS,
        prefix_ids: Ids = NO_IDS,
        image: EncodedImage | None = None,
        *,
        logits: bool = True,
    ) -> Output:
        """Read the pending tokens, `prefix_ids` [1, P], an image, and `text_ids` [1, T].

        The output follows the last token of text, so with an image T is at least 1. A call that is
        broken off, by Ctrl-C or a failing engine, leaves a sequence that reads nothing until
        `reset`.
        """
        with self._alone():
            self.check()
            pending = np.array([self.pending], np.int64)
            if image is None:
                text_ids = np.concatenate([pending, prefix_ids, text_ids], 1)
                before = NO_IDS
            else:
                before = np.concatenate([pending, prefix_ids], 1)
            if not text_ids.size:
                raise InputError("a sequence reads at least one token of text in a call; got none")
            if image is not None:
                self._check_ratio(image)
            after = self._after(before, image, text_ids)
            inputs = DecoderInputs(
                before,
                text_ids,
                image,
                self._state.position,
                self._state.lengths,
                after.lengths,
                logits,
                None if image is None else counts_of(image),
            )
            self._broken = "a call was broken off before its end"
            try:
                output = self.engine.run(inputs, self._caches)
            except (CapacityError, SessionError):  # nothing was run
                self._broken = ""
                raise
            if image is not None:
                after = replace(after, layer_kept=output.kept)
            self._state, self.pending = after, []
            self._broken = ""
            return output

    def fork(self) -> Sequence:
        """Another sequence that has read the same; from here on each goes its own way.

        SessionError where the caches hold an image whose tokens were chosen by the text that was
        read with it: another question would find the wrong ones. `Engine.encode_image` saves what
        can be saved there.
        """
        with self._alone():
            self.check()
            prune = self.engine.manifest.prune
            if self._state.image is not None and prune.reads_text:
                raise SessionError(
                    f"method {prune.method} chose the image's tokens by the text after it, so a"
                    " copy would not fit another question; fork before the image is read, and"
                    " encode the image once: Engine.encode_image"
                )
        return self.branch()

    def branch(self) -> Sequence:
        """As `fork`, for another answer to the question that was read last. An image whose tokens
        were chosen for this question may be in the caches, so the copy reads no further question.
        """
        with self._alone():
            self.check()
            twin = Sequence(self.engine, self.engine.copy(self._caches, self._state.lengths))
            twin._state, twin.pending = self._state, [*self.pending]
            return twin

    def cache_bytes(self) -> int:
        """Bytes that the KV caches take now."""
        return self._caches.bytes()

    def break_off(self, why: str) -> None:
        """Nothing more can be read until `reset`, because what was read is not known for sure."""
        self._broken = why

    def check(self) -> None:
        """SessionError where nothing can be read, or not before a reset."""
        if self._closed:
            raise SessionError(CLOSED)
        if self._broken:
            raise SessionError(f"{self._broken}; start again with a new first question")

    def close(self) -> None:
        """Give the caches back; nothing can be read any more."""
        if not self._closed:
            self._closed = True
            self.engine.free(self._caches)

    def _check_ratio(self, image: EncodedImage) -> None:
        """SessionError where the dialogue has an image of another ratio."""
        if (held := self._state.image) is not None:
            cr, new = held.prune.cr, at_its_ratio(image).prune.cr
            if new != cr:
                raise SessionError(
                    f"this dialogue is at CR {cr:g}, the image was encoded at CR {new:g}; begin a"
                    " new dialogue for another ratio"
                )

    def _after(self, prefix_ids: Ids, image: EncodedImage | None, text_ids: Ids) -> _State:
        """The state once all this has been read."""
        state, text = self._state, prefix_ids.size + text_ids.size
        if image is None:
            return _State(
                state.lengths + text,
                np.concatenate([state.ids, prefix_ids[0], text_ids[0]]),
                state.position + text,
                state.text + text,
                state.image,
                state.vision_kept,
                state.layer_kept,
                state.warnings,
            )
        return _State(
            state.lengths + text + counts_of(image),
            np.concatenate([state.ids, prefix_ids[0], self._visual_ids, text_ids[0]]),
            state.position + text + at_its_ratio(image).decoder.image_positions,
            state.text + text,
            image.manifest,
            image.kept,
            state.layer_kept,
            image.warnings,
        )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise SessionError("this sequence is in use; give each thread a sequence of its own")
        try:
            if self._closed:
                raise SessionError(CLOSED)
            yield
        finally:
            self._busy.release()
