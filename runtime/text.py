"""Prompts -> token ids and token ids -> text, with the checkpoint's own tokenizer and template.

A conversation is encoded as transformers would encode it: the template and the prompt as one
string, cut at the image token afterwards, because tokenizers
treat the start of a string differently.

What a user types never becomes a control token. A prompt that holds one ("</s>") is encoded in
pieces, the typed ones as plain text; where even that yields the control token, it is refused.
Other added tokens ("<ref>") become their ids.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import BundleError, InputError
from edgeprune.manifest import DATE, TextRecord
from edgeprune.runtime.formats import Vocabulary
from edgeprune.runtime.tokenizer import SafeTokenizer

IMAGE = "<image>"
"""What a user types where the image belongs, whatever the model's own image token is called."""

_IMAGE_LINE = re.compile(r"\{image\}\n?")
_HOLE = re.compile(r"\{(prompt|system)\}")
_CONTEXTS = ("a", "1", ".")
_NO_CHARACTER = "\U0010fffd"  # in no vocabulary, so it shows which token means "unknown"

Tokens = NDArray[np.int64]
Segment = tuple[str, bool]  # text, and whether the user typed it


class Prompter:
    """The tokenizer and the conversation template of one bundle."""

    def __init__(self, tokenizer_file: Path | str, record: TextRecord) -> None:
        self._tokenizer = SafeTokenizer.open(tokenizer_file)
        self._record = record
        added = self._tokenizer.added
        _check_record(record, added.keys(), tokenizer_file)
        before, after = record.around_image
        self._image = before + added[record.image_token_id].content + after
        unknown = self._tokenizer.ids_of_word(_NO_CHARACTER)
        unknown -= set(record.eos_token_ids)
        self._control = added.keys() - unknown - set(record.user_tokens)
        # tokens after which the text so far may still change, or has not changed
        self._pending = {i for i, token in added.items() if token.special}
        for byte in range(256):
            if (token := self._tokenizer.id_of(f"<0x{byte:02X}>")) is not None:
                self._pending.add(token)

    def first_turn(self, prompt: str, system: str | None = None) -> tuple[Tokens, Tokens]:
        """Ids before and after the image, [1, P] and [1, T].

        The image stands where the template puts it or, if the prompt holds `<image>`, there. A
        `system` text stands in place of the template's own; InputError where that takes none.
        """
        pieces = prompt.split(IMAGE)
        if len(pieces) > 2:
            raise InputError(
                f"the prompt holds {IMAGE} {len(pieces) - 1} times; keep one, which stands for all"
                " that is shown"
            )
        _check("".join(pieces))
        template = self._record.first if system is None else self._with_system(system)
        if len(pieces) == 2:
            template = _IMAGE_LINE.sub("", template)
        typed = {"prompt": pieces, "system": [system or ""]}
        ids = self._encode(self._segments(template, typed), self._start)
        if self._record.image_token_id not in ids:
            raise BundleError(
                "tokenizer.json does not read the bundle's image token as one token; export the"
                " bundle again"
            )
        index = ids.index(self._record.image_token_id)
        return _row(ids[:index]), _row(ids[index + 1 :])

    def next_turn(self, prompt: str) -> Tokens:
        """Ids of a further question, [1, T], to follow the answer's ids (without the final eos)."""
        if IMAGE in prompt:
            raise InputError(
                f"only the first prompt may hold {IMAGE}; ask about a new image in a new session"
            )
        _check(prompt)
        segments = self._segments(self._record.next, {"prompt": [prompt]})
        return _row(self._encode(segments, self._continue))

    def answer(self, text: str) -> Tokens:
        """Ids of an answer that is known as text alone, [1, n], to follow a question's ids.

        A model writes a space after a template that ends in a colon.
        """
        _check_text(text, "answer")
        space = " " if self._record.next.endswith(":") else ""
        return _row(self._encode([("", False), (space + text, True)], self._continue))

    def _with_system(self, system: str) -> str:
        _check_text(system, "system text")
        if IMAGE in system:
            raise InputError(f"the system text may not hold {IMAGE}; put it into the prompt")
        if not self._record.with_system:
            raise InputError(
                "this model's chat template takes no system message; put the text into the prompt"
            )
        return self._record.with_system

    def _segments(self, template: str, typed: dict[str, list[str]]) -> list[Segment]:
        """The text of a turn; an image stands between the pieces that a user typed."""
        template = DATE.sub(lambda now: time.strftime(now[1]), template)
        template, *parts = _HOLE.split(template.replace("{image}", self._image))
        found: list[Segment] = [(template, False)]
        for hole, text in zip(parts[::2], parts[1::2], strict=True):
            first, *others = typed[hole]
            found.append((first, True))
            for piece in others:
                found += [(self._image, False), (piece, True)]
            found.append((text, False))
        return found

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What keeps answers to a form; BackendError where its library is missing."""
        return Vocabulary(self._tokenizer, self._record.eos_token_ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of an answer, without control tokens."""
        return self._tokenizer.decode(ids)

    def continued(self, before: list[int], token: int) -> str:
        """What a token adds to the text of those before it; a control token adds nothing."""
        return self._growth(before, [token])

    def pieces(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of an answer as it grows; the pieces joined are `decode` of all ids.

        A piece is held back while later tokens could still change it: a character whose bytes are
        not all there, or a run of byte tokens, which is decoded as a whole.
        """
        last: list[int] = []  # the ids of the last piece: all the context that a decoder looks at
        fresh: list[int] = []
        for token in map(int, ids):
            fresh.append(token)
            if token in self._pending:
                continue
            piece = self._growth(last, fresh)
            if piece and not piece.endswith("\ufffd"):
                yield piece
                last, fresh = fresh, []
        if rest := self._growth(last, fresh):
            yield rest

    def _growth(self, last: list[int], fresh: list[int]) -> str:
        return self.decode(last + fresh)[len(self.decode(last)) :]

    def _encode(self, segments: list[Segment], encode: Callable[[str], list[int]]) -> list[int]:
        """All segments as one string, or each by itself if the user's text holds control tokens."""
        wanted = self._controls(encode("".join("a" if typed else text for text, typed in segments)))
        ids = encode("".join(text for text, _ in segments))
        if self._controls(ids) != wanted:
            ids = encode(segments[0][0])
            for text, typed in segments[1:]:
                tokenizer = self._without_controls if typed else self._tokenizer
                ids += _follow(tokenizer.encode, text)
        if self._controls(ids) != wanted:
            raise InputError(
                "the prompt holds a control token of this model that its tokenizer cannot read as"
                " text; leave it out"
            )
        return ids

    def _controls(self, ids: list[int]) -> list[int]:
        return [i for i in ids if i in self._control]

    def _start(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, special=self._record.add_special_tokens)

    def _continue(self, text: str) -> list[int]:
        return _follow(self._tokenizer.encode, text)

    @cached_property
    def _without_controls(self) -> SafeTokenizer:
        """What reads a user's text, in which control tokens are letters."""
        return self._tokenizer.without(self._control)


def _follow(encode: Callable[[str], list[int]], text: str) -> list[int]:
    """Ids of a text that follows another one, so without what marks the start of a string."""
    for context in _CONTEXTS:
        alone, both = encode(context), encode(context + text)
        if both[: len(alone)] == alone:
            return both[len(alone) :]
    return encode(text)


def _check_record(record: TextRecord, added: Collection[int], tokenizer_file: Path | str) -> None:
    holes = [(record.first, "{image}"), (record.first, "{prompt}"), (record.next, "{prompt}")]
    if record.with_system:
        holes += [(record.with_system, f"{{{hole}}}") for hole in ("image", "prompt", "system")]
    odd = "{system}" in record.first + record.next  # only the other template has that hole
    if odd or record.image_token_id not in added or any(t.count(p) != 1 for t, p in holes):
        raise BundleError(
            f"{tokenizer_file} and the bundle's prompt template do not fit; export the bundle again"
        )


def _check(prompt: str) -> None:
    if not prompt.strip():
        raise InputError("the prompt is empty; ask something about the image")
    _check_text(prompt, "prompt")


def _check_text(text: str, what: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"the {what} is no valid text ({error}); give it as UTF-8") from error


def _row(ids: list[int]) -> Tokens:
    return np.array([ids], np.int64).reshape(1, -1)
