"""The messages of a request -> a conversation: what is shown, what was said, and the question."""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

from edgeprune.runtime.text import IMAGE
from edgeprune.serve.errors import HttpError, refused
from edgeprune.serve.fetching import PARAM
from edgeprune.serve.images import ImageDoors

LONGEST = 1 << 20
"""Letters of all messages; more than any model's positions, and read by the tokenizer at once."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Images, turns that were answered, and the question that is not."""

    images: tuple[bytes, ...]
    system: str | None
    turns: tuple[tuple[str, str], ...]  # question, and answer without white space at its ends
    prompt: str
    cr: float | None = None  # of a bundle with several ratios; None: its default

    def image_key(self) -> bytes:
        """Equal for equal images at one ratio."""
        return _hash(*self.images, b"" if self.cr is None else repr(self.cr).encode())

    def keys(self) -> list[bytes]:
        """Of the conversation after each answered turn, by all that was said up to it."""
        key = _hash(self.image_key(), *([] if self.system is None else [_text(self.system)]))
        found = []
        for prompt, answer in self.turns:
            key = following(key, prompt, answer)
            found.append(key)
        return found

    def after(self, answer: str) -> bytes:
        """The key once the question has been answered."""
        turns = (*self.turns, (self.prompt, answer))
        return replace(self, turns=turns, prompt="").keys()[-1]


def following(key: bytes, prompt: str, answer: str) -> bytes:
    """The key of a conversation that went on by one turn."""
    return _hash(key, _text(prompt), _text(answer))


def conversation(messages: Any, doors: ImageDoors) -> Conversation:
    """Messages in OpenAI's form: a system message or none, then user and assistant in turn.

    Images stand in the first user message, side by side; HttpError where messages are otherwise.
    """
    if not isinstance(messages, list) or not messages:
        raise refused("messages is a list with at least one message", PARAM)
    found = [_message(message) for message in messages]
    system = None
    if found[0][0] in ("system", "developer"):
        system, urls = _parts(found.pop(0)[1])
        if urls:
            raise refused("a system message holds text alone", PARAM)
    wanted = ["user", "assistant"] * (len(found) // 2) + ["user"]
    if [role for role, _ in found] != wanted:
        raise refused(
            "after a system message, which may be left out, user and assistant messages take"
            " turns; the first and the last are the user's",
            PARAM,
        )
    texts, shown = [], list[str]()
    for index, (role, content) in enumerate(found):
        text, urls = _parts(content)
        if urls and index:
            raise refused(
                f"only the first user message shows images, a later {role} message holds one; begin"
                " a new conversation about another image",
                PARAM,
            )
        texts.append(text)
        shown += urls
    if not shown:
        raise refused("the first user message shows no image; add an image_url part", PARAM)
    if (letters := len(system or "") + sum(map(len, texts))) > LONGEST:
        raise HttpError(
            400,
            f"the messages have {letters} letters, more than {LONGEST}; shorten them",
            PARAM,
            "context_length_exceeded",
        )
    answers = [text.strip() for text in texts[1::2]]
    turns = tuple(zip(texts[:-1:2], answers, strict=True))
    reader = doors.open()
    images = tuple(map(reader.read, shown))
    return Conversation(images, system, turns, texts[-1])


def _message(message: Any) -> tuple[str, Any]:
    if not isinstance(message, dict) or not isinstance(role := message.get("role"), str):
        raise refused("a message is an object with role and content", PARAM)
    if role not in ("system", "developer", "user", "assistant"):
        raise refused(f"a role is system, user or assistant; got {role[:40]!r}", PARAM)
    if message.get("tool_calls"):
        raise refused("this server has no tools; leave tool_calls out", PARAM)
    return role, message.get("content")


def _parts(content: Any) -> tuple[str, list[str]]:
    """The text of a message and the addresses of its images. `<image>` in the text says where the
    images stand if text comes before them; else they stand where the template puts them."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise refused("content is a text, or a list of parts with a type", PARAM)
    text, urls, closed = "", list[str](), False
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
            closed = closed or bool(urls)
        elif kind == "image_url":
            if closed:
                raise refused("images stand side by side, with no text between them", PARAM)
            if text and not urls:
                text += IMAGE
            urls.append(_url(part.get("image_url")))
        else:
            raise refused(
                "a part is {type: text, text: ...} or {type: image_url, image_url: {url: ...}}",
                PARAM,
            )
    return text, urls


def _url(value: Any) -> str:
    url = value.get("url") if isinstance(value, dict) else value
    if not isinstance(url, str):
        raise refused("image_url is an object with a url", PARAM)
    return url


def _text(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _hash(*parts: bytes) -> bytes:
    """Of parts one by one, so that no two lists of parts run together."""
    total = sha256()
    for part in parts:
        total.update(sha256(part).digest())
    return total.digest()
