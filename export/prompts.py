"""The checkpoint's chat template, rendered once and frozen as a TextRecord.

`first` is a user's first turn and `next` every later one, up to where the model begins to answer.
`next` starts with what the template puts after the text of an answer: an end token too, if it
writes one there, because the runtime keeps the one that the model generated out of its cache.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from edgeprune.bundle import TextRecord
from edgeprune.errors import ModelError
from edgeprune.export.generation import Generation
from edgeprune.models._chat import assumed
from edgeprune.models._media import Media

Turn = tuple[str, list[str]]  # role, and texts of which one may be the image token


def text_record(
    source: Any,
    config: Any,
    generation: Generation,
    media: Media | None = None,
    visual_ids: Sequence[int] = (),
) -> TextRecord:
    """Freeze the prompt format of a processor (or a tokenizer) and the defaults of generation.

    `media` says what prompts show, None for one picture; `visual_ids` [V] is what transformers has
    in `input_ids` for it. A LLaVA checkpoint without a chat template
    gets that of LLaVA-1.5; `notes` says so.
    """
    tokenizer = _tokenizer(source)
    image = _Image.of(tokenizer, config, media)
    if media is not None:
        _token(tokenizer, media.token)
    first, following = _templates(source, config, image)
    bos = tokenizer.bos_token
    return TextRecord(
        first=first,
        next=following,
        system="",  # a template's own system text is part of `first`
        add_special_tokens=not (bos and first.startswith(bos)),
        image_token_id=config.image_token_id if media is None else media.token,
        eos_token_ids=generation.eos_token_ids,
        generation=generation.sampling,
        around_image=media.around if media else ("", ""),
        visual_ids=tuple((i, len(list(run))) for i, run in groupby(visual_ids)),
    )


def save_tokenizer(source: Any, path: Path) -> None:
    """Write tokenizer.json as transformers runs it, which may differ from the checkpoint's file."""
    text = _tokenizer(source).backend_tokenizer.to_str(pretty=True)
    path.write_text(text, encoding="utf-8")  # an OSError names a full disk, `save` would not


def notes(source: Any, config: Any, media: Media | None = None) -> tuple[str, ...]:
    """What `text_record` had to assume or leave out, one sentence each; often nothing."""
    tokenizer = _tokenizer(source)
    found = []
    if _owner(source) is None:
        found.append("the checkpoint has no chat template; LLaVA-1.5's is used")
    else:
        found += _template_notes(source, _Image.of(tokenizer, config, media))
    if tokenizer.clean_up_tokenization_spaces and not _is_bpe(tokenizer):
        found.append(
            "transformers tidies spaces before punctuation in answers, the runtime does not"
        )
    return tuple(found)


def _template_notes(source: Any, image: _Image) -> list[str]:
    found = []
    if " {prompt} " not in _render_first(source, image, " {prompt} "):
        found.append("the chat template trims prompts, the runtime takes them as they are")
    bare = re.sub(r"\{image\}\n?", "", _render_first(source, image, "{prompt}"))
    if bare not in _renderings(source, [("user", ["{prompt}"])]):
        found.append("an <image> inside a prompt lacks what the template puts around an image")
    return found


def _tokenizer(source: Any) -> Any:
    tokenizer = getattr(source, "tokenizer", source)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ModelError(
            f"the checkpoint's tokenizer is a {type(tokenizer).__name__} without a tokenizer.json;"
            " convert it with transformers' fast tokenizers"
        )
    return tokenizer


def _is_bpe(tokenizer: Any) -> bool:
    return type(tokenizer.backend_tokenizer.model).__name__ == "BPE"


@dataclass(frozen=True, slots=True)
class _Image:
    """What a template writes for a picture or a video, and how many stand in a prompt."""

    token: str
    part: str = "image"
    count: int = 1

    @classmethod
    def of(cls, tokenizer: Any, config: Any, media: Media | None) -> _Image:
        if media is None:
            return cls(_token(tokenizer, getattr(config, "image_token_id", None)))
        return cls(_token(tokenizer, media.placeholder), media.part, media.count)


def _token(tokenizer: Any, wanted: int | None) -> str:
    token = None if wanted is None else tokenizer.convert_ids_to_tokens(wanted)
    if token is None or tokenizer.encode(token, add_special_tokens=False) != [wanted]:
        raise ModelError(
            f"the tokenizer does not read the configuration's image token {wanted} ({token!r}) as"
            " one token; add it to the tokenizer's added tokens"
        )
    return str(token)


def _owner(source: Any) -> Any:
    """Who holds the chat template: the processor, its tokenizer or nobody."""
    owners = (source, getattr(source, "tokenizer", None))
    return next((o for o in owners if getattr(o, "chat_template", None)), None)


def _templates(source: Any, config: Any, image: _Image) -> tuple[str, str]:
    """`first` with {image} and {prompt}, `next` with {prompt}."""
    if _owner(source) is None:
        first, later = assumed(config.model_type, image.count)
        return first, (_tokenizer(source).eos_token or "") + later
    first = _render_first(source, image, "{prompt}")
    return first, _render_next(source, image, first)


def _render_first(source: Any, image: _Image, prompt: str) -> str:
    """A first turn, with {image} for all that stands from the first picture to the last."""
    token, count = image.token, image.count
    for text in _renderings(source, [("user", [token] * count + [prompt])], image):
        if text.count(token) == count and text.count(prompt.strip()) == 1:
            end = text.rindex(token) + len(token)
            return text[: text.index(token)] + "{image}" + text[end:]
    many = "one" if count == 1 else count
    raise ModelError(
        f"the chat template does not show {many} {token} and the prompt, be the content a list of"
        " parts or a string; repair chat_template.jinja"
    )


def _render_next(source: Any, image: _Image, first: str) -> str:
    turns: list[Turn] = [
        ("user", [image.token] * image.count + ["{first}"]),
        ("assistant", ["{answer}"]),
        ("user", ["{prompt}"]),
    ]
    head, tail = first.replace("{prompt}", "{first}").rstrip().split("{image}")
    for text in _renderings(source, turns, image):
        before, _, after = text.partition("{answer}")
        begun = before.startswith(head) and before.rstrip().endswith(tail)
        if begun and after.count("{prompt}") == 1:
            return after
    raise ModelError(
        "the chat template rewrites earlier turns as a conversation goes on, so their cache cannot"
        " be kept; use a template that only appends"
    )


def _renderings(source: Any, turns: list[Turn], image: _Image | None = None) -> Iterator[str]:
    """The turns as the template shows them, with contents as lists of parts, then as strings."""
    for content in (_parts, _string):
        messages = [{"role": role, "content": content(texts, image)} for role, texts in turns]
        try:
            text = _owner(source).apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        except Exception:  # a template may fail in any way at contents of the other kind
            continue
        yield str(text)


def _parts(texts: list[str], image: _Image | None) -> list[dict[str, str]]:
    shown = image and image.token
    part = {"type": image.part} if image else {}
    return [part if t == shown else {"type": "text", "text": t} for t in texts]


def _string(texts: list[str], image: _Image | None) -> str:
    return "\n".join(texts)
