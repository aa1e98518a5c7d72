"""The dialogues of one bundle: some sequences answer, others are kept while their caches fit.

A kept sequence goes on where a request's messages are exactly what it has read and answered. Where
none does, a sequence reads the turns again as follow-ups. So an answer depends on the messages
alone, up to rounding: keys and values come out of one call in place of several.

- What was said is remembered as tokens, also after its sequence was taken for another dialogue.
- Answers that this server did not give, or that ended before a stop string, are read as text.

Used by one thread.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from edgeprune.runtime.answer import Timings
from edgeprune.runtime.backend import EncodedImage, Ids
from edgeprune.runtime.engine import Engine
from edgeprune.runtime.media import prepare
from edgeprune.runtime.sequence import NO_IDS
from edgeprune.runtime.session import Session
from edgeprune.serve.messages import Conversation

REMEMBERED = 4096
"""Answers whose tokens are remembered: a few bytes a token."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A dialogue that has read all but the question."""

    session: Session
    image: EncodedImage | None  # None: the question is not the first
    cached: int  # tokens that its caches held before, visual tokens before pruning among them
    timings: Timings  # of the image, where it was encoded for this question


class Dialogues:
    """At most `limit` sequences on an engine, or as many as take `kept_bytes` of caches where that
    is more."""

    def __init__(self, engine: Engine, limit: int, kept_bytes: int = 0) -> None:
        self.engine, self.limit, self.kept_bytes = engine, limit, kept_bytes
        self.continued = self.replayed = self.evicted = 0
        self._kept: OrderedDict[bytes, Session] = OrderedDict()  # the longest unused one first
        self._free: list[Session] = []
        self._used = 0
        self._said: OrderedDict[bytes, Ids] = OrderedDict()
        self._images: OrderedDict[bytes, EncodedImage] = OrderedDict()

    def open(self, conversation: Conversation) -> Opened:
        """A session for the question; `keep` or `drop` takes it back."""
        keys = conversation.keys()
        session = self._kept.pop(keys[-1], None) if keys else None
        if session is not None:
            self._used += 1
            self.continued += 1
            return Opened(session, None, session.sequence.ids.size, Timings())
        session = self._unused()
        self._used += 1
        try:
            if not keys:
                timings = Timings()
                return Opened(session, self._encoded(conversation, timings), 0, timings)
            self._replay(session, conversation, keys)
        except BaseException:
            self.drop(session)
            raise
        return Opened(session, None, 0, Timings())

    def keep(self, session: Session, key: bytes, said: tuple[int, ...]) -> None:
        """Keep a sequence that has answered, so that the dialogue can go on. `key` tells all that
        was said; `said` are the tokens of the answer, without the end of the turn."""
        self._said[key] = np.array(said, np.int64)
        self._said.move_to_end(key)
        if len(self._said) > REMEMBERED:
            self._said.popitem(last=False)
        self._used -= 1
        if (other := self._kept.pop(key, None)) is not None:
            self._reset(other)
        self._kept[key] = session

    def drop(self, session: Session) -> None:
        """Take back a sequence whose dialogue cannot go on."""
        self._used -= 1
        self._reset(session)

    def close(self) -> None:
        """Free all sequences that are not answering."""
        for session in (*self._free, *self._kept.values()):
            session.close()
        self._free.clear()
        self._kept.clear()
        self._images.clear()

    def _reset(self, session: Session) -> None:
        session.reset()
        self._free.append(session)

    def _unused(self) -> Session:
        """A sequence that holds nothing; where there is no room for one, the longest unused one."""
        if self._free:
            return self._free.pop()
        if self._used + len(self._kept) < self.limit or self._fits_another():
            return Session(self.engine)
        _, session = self._kept.popitem(last=False)
        self.evicted += 1
        session.reset()
        return session

    def _fits_another(self) -> bool:
        """Whether one more sequence of the size of those that are kept fits beside them."""
        sizes = [session.sequence.cache_bytes() for session in self._kept.values()]
        return sum(sizes) + max(sizes, default=self.kept_bytes + 1) <= self.kept_bytes

    def _replay(self, session: Session, conversation: Conversation, keys: list[bytes]) -> None:
        """Read the turns again: the image with the first question, then answers and questions."""
        self.replayed += 1
        prompter, sequence = self.engine.prompter, session.sequence
        prompts = [prompt for prompt, _ in conversation.turns]
        prefix_ids, text_ids = prompter.first_turn(prompts[0], conversation.system)
        span = self.engine.manifest.at(conversation.cr).decoder.image_positions
        self._check_room(session, prefix_ids.size + text_ids.size, span)
        image = self._encoded(conversation, Timings())
        sequence.read(text_ids, prefix_ids, image, logits=False)
        for index, (_, answer) in enumerate(conversation.turns):
            sequence.pending = self._answer_ids(keys[index], answer).tolist()
            if index + 1 < len(prompts):
                text_ids = prompter.next_turn(prompts[index + 1])
                self._check_room(session, len(sequence.pending) + text_ids.size)
                sequence.read(text_ids, logits=False)

    def _answer_ids(self, key: bytes, answer: str) -> Ids:
        if key in self._said:
            self._said.move_to_end(key)
            return self._said[key]
        ids: Ids = self.engine.prompter.answer(answer)[0] if answer else NO_IDS[0]
        return ids

    def _check_room(self, session: Session, text: int, span: int = 0) -> None:
        sequence = session.sequence
        self.engine.room(sequence.position, sequence.text_tokens, text, span, None)

    def _encoded(self, conversation: Conversation, timings: Timings) -> EncodedImage:
        """What the vision graph makes of the images, which is the same at every question; the
        times that it takes now are added to `timings`."""
        key = conversation.image_key()
        if (image := self._images.pop(key, None)) is None:
            clock = time.perf_counter
            started = clock()
            prepared = prepare(list(conversation.images), self.engine.manifest.image)
            ready = clock()
            image = self.engine.encode_pixels(prepared.pixels, prepared.warnings, conversation.cr)
            timings.preprocess = 1e3 * (ready - started)
            timings.vision = 1e3 * (clock() - ready)
        self._images[key] = image
        if len(self._images) > self.limit:
            self._images.popitem(last=False)
        return image
