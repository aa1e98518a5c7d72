"""The chat template of a checkpoint, rendered with holes in place of what comes later.

    {image} {prompt}   the visual tokens and the question
    {system}           the user's own system message
    {now:%Y-%m-%d}     the date, where the template asks for it: strftime_now("%Y-%m-%d")

Templates are rendered by transformers, with contents as lists of parts, then as strings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from edgeprune.errors import ModelError
from edgeprune.manifest import DATE
from edgeprune.models._chat import known, token_at
from edgeprune.models._media import Media, Turns

Turn = tuple[str, list[str]]  # role, and texts of which one may be the image token

CLOCK = "{% macro strftime_now(form) %}{{ '{now:' ~ form ~ '}' }}{% endmacro %}\n"
"""Before a template: writes holes in place of dates."""

CONTENTS = (("parts", "parts"), ("string", "parts"), ("string", "string"))
"""Forms of a system message's content, and of all others'."""


@dataclass(frozen=True, slots=True)
class Templates:
    """A dialogue with holes: its first turn, with a system message too, and every later turn.

    `following` starts with what the template puts after the text of an answer: an end token too,
    if it writes one there, because the runtime keeps the one that the model generated out of its
    cache. `with_system` is empty where a template takes no system message.
    """

    first: str
    following: str
    with_system: str
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ImageToken:
    """What a template writes for an image or a video, and how many stand in a prompt."""

    text: str
    part: str = "image"
    count: int = 1
    assumed: Turns | None = None  # how a dialogue is written where there is no template

    @classmethod
    def of(cls, tokenizer: Any, config: Any, media: Media | None) -> ImageToken:
        if media is None:
            return cls(token_text(tokenizer, getattr(config, "image_token_id", None)))
        text = token_text(tokenizer, media.placeholder)
        return cls(text, media.part, media.count, media.assumed)


def token_text(tokenizer: Any, wanted: int | None) -> str:
    """The text of an image token; ModelError where the tokenizer does not read it as that token."""
    token = None if wanted is None else token_at(tokenizer, wanted)
    if token is None or tokenizer.encode(token, add_special_tokens=False) != [wanted]:
        raise ModelError(
            f"the tokenizer does not read the configuration's image token {wanted} ({token!r}) as"
            " one token; add it to the tokenizer's added tokens"
        )
    return str(token)


def templates(source: Any, tokenizer: Any, image: ImageToken) -> Templates:
    """The template of a processor or a tokenizer with holes; ModelError where it cannot be frozen.

    A checkpoint without a chat template gets what its family assumes; `notes` says so.
    """
    owner = template_owner(source)
    if owner is None:
        turns = known(image.assumed)
        later = (tokenizer.eos_token or "") + turns.later
        note = f"the checkpoint has no chat template; {turns.source}'s is used"
        return Templates(turns.first, later, "{system} " + turns.first, (note,))
    renderer = _Renderer(owner, image)
    first = renderer.first("{prompt}")
    if first is None:
        many = "one" if image.count == 1 else image.count
        raise ModelError(
            f"the chat template does not show {many} {image.text} and the prompt, be the content a"
            " list of parts or a string; repair chat_template.jinja"
        )
    following = renderer.following(first)
    if following is None:
        raise ModelError(
            "the chat template rewrites earlier turns as a conversation goes on, so their cache"
            " cannot be kept; use a template that only appends"
        )
    system = [("system", ["{system}"])]
    with_system = renderer.first("{prompt}", system) or ""
    if with_system and renderer.following(with_system, system) != following:
        with_system = ""  # it would have to be written anew at every turn
    return Templates(first, following, with_system, tuple(renderer.notes()))


def template_owner(source: Any) -> Any:
    """Who holds the chat template: the processor, its tokenizer or nobody."""
    owners = (source, getattr(source, "tokenizer", None))
    return next((o for o in owners if getattr(o, "chat_template", None)), None)


def template_text(source: Any) -> str:
    """The source of the chat templates of a processor or a tokenizer."""
    text = getattr(template_owner(source), "chat_template", "")
    return "".join(text.values()) if isinstance(text, dict) else str(text)


@dataclass(frozen=True, slots=True)
class _Renderer:
    owner: Any
    image: ImageToken

    def first(self, prompt: str, system: list[Turn] | None = None) -> str | None:
        """A first turn, with {image} for all that stands from the first image to the last."""
        token, count = self.image.text, self.image.count
        wanted = [prompt, *(text for _, texts in system or [] for text in texts)]
        for text in self.rendered([*(system or []), ("user", [token] * count + [prompt])]):
            if text.count(token) == count and all(text.count(w.strip()) == 1 for w in wanted):
                end = text.rindex(token) + len(token)
                return text[: text.index(token)] + "{image}" + text[end:]
        return None

    def following(self, first: str, system: list[Turn] | None = None) -> str | None:
        """A later turn, from the end of an answer's text on."""
        turns: list[Turn] = [
            *(system or []),
            ("user", [self.image.text] * self.image.count + ["{first}"]),
            ("assistant", ["{answer}"]),
            ("user", ["{prompt}"]),
        ]
        head, tail = first.replace("{prompt}", "{first}").rstrip().split("{image}")
        for text in self.rendered(turns):
            before, _, after = text.partition("{answer}")
            begun = before.startswith(head) and before.rstrip().endswith(tail)
            if begun and after.count("{prompt}") == 1:
                return after
        return None

    def notes(self) -> Iterator[str]:
        """What the runtime cannot do as the template does."""
        first = self.first("{prompt}") or ""
        if " {prompt} " not in (self.first(" {prompt} ") or ""):
            yield "the chat template trims prompts, the runtime takes them as they are"
        bare = re.sub(r"\{image\}\n?", "", first)
        if bare not in self.rendered([("user", ["{prompt}"])]):
            yield "an <image> inside a prompt lacks what the template puts around an image"
        if "{now:" in first:
            yield "the chat template writes the date; the runtime takes that of the device's clock"

    def rendered(self, turns: list[Turn]) -> Iterator[str]:
        """The turns as the template shows them, in each form of the contents."""
        for of_system, of_others in CONTENTS:
            messages = [
                self._message(role, texts, of_system if role == "system" else of_others)
                for role, texts in turns
            ]
            try:
                text = self._text(messages)
            except ModelError:
                raise
            except Exception:  # a template may fail in any way at contents of the other kind
                continue
            yield text

    def _text(self, messages: list[dict[str, Any]]) -> str:
        """A dialogue with holes for dates; ModelError where the template does more with them."""
        show = partial(
            self.owner.apply_chat_template, messages, add_generation_prompt=True, tokenize=False
        )
        before, shown, after = datetime.now(), str(show()), datetime.now()
        if "strftime_now" not in (source := template_text(self.owner)):
            return shown
        text = str(show(chat_template=CLOCK + source))
        if shown not in (_dated(text, before), _dated(text, after)):
            raise ModelError(
                "the chat template makes something else of today's date, which is known at run"
                " time only; let it write strftime_now(...) as it is, in chat_template.jinja"
            )
        return text

    def _message(self, role: str, texts: list[str], form: str) -> dict[str, Any]:
        if form == "string":
            return {"role": role, "content": "\n".join(texts)}
        part = {"type": self.image.part}
        parts = [part if t == self.image.text else {"type": "text", "text": t} for t in texts]
        return {"role": role, "content": parts}


def _dated(text: str, now: datetime) -> str:
    return DATE.sub(lambda hole: now.strftime(hole[1]), text)
