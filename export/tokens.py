"""Which tokens of a checkpoint's tokenizer a user may type, and whether the model has them all."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from edgeprune.errors import ModelError

_RESERVED = re.compile(
    r"image|img|vision|video|audio|frame|pad|im_start|im_end|begin_of|end_of|endoftext|header|eot"
    r"|eom|turn|system|user|assistant|human|inst|sys|tool|python_tag|think|reserved|unused",
    re.IGNORECASE,
)
"""Names of tokens for media and chats, where nothing else in a checkpoint says what they are."""

_MARKUP = re.compile(r"<[^<>\s{}]{1,40}>")
_ID_OF_A_TOKEN = re.compile(r"_token_(id|ids|index)$")


def user_tokens(
    tokenizer: Any, config: Any, template: str, ends: Iterable[int], rows: int
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Added tokens that become their ids where a user types them, as with transformers, and what
    to tell; all others stay text, so that nobody can type a control token.

    A control token is one that

    - has a role in the tokenizer (bos, eos, pad, ...) or ends an answer,
    - stands in the chat template, other than white space,
    - is named in config.json, as the tokens of images are,
    - has a name like those of media and chats.
    """
    roles = set(tokenizer.special_tokens_map.values())
    named = {*ends, *_named_ids(config)}
    free, notes = list[int](), list[str]()
    for number, token in sorted(tokenizer.added_tokens_decoder.items()):
        text = token.content
        written = text in template and not text.isspace()
        if text in roles or number in named or written or _RESERVED.search(text):
            continue
        if number < rows:
            free.append(number)
        else:
            notes.append(
                f"the tokenizer's added token {text!r} has id {number}, the embedding {rows} rows;"
                " a prompt that holds it is read as letters"
            )
    return tuple(free), tuple(notes)


def check_rows(tokenizer: Any, texts: Sequence[str], rows: int) -> None:
    """ModelError where a prompt may hold an id that the embedding, of `rows` tokens, does not."""
    vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    last = max(vocabulary, key=vocabulary.__getitem__, default="")
    written = {i for text in texts for i in tokenizer.encode(text, add_special_tokens=True)}
    number = max([vocabulary.get(last, 0), *written])
    if number >= rows:
        raise ModelError(
            f"the tokenizer has the token {tokenizer.convert_ids_to_tokens(number)!r} with id"
            f" {number}, the model's embedding {rows} rows: the two are not of one checkpoint;"
            " put the model's own tokenizer.json there"
        )


def letters(tokenizer: Any, texts: Sequence[str]) -> tuple[str, ...]:
    """What looks like a control token in a template, and is none in this tokenizer."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    found = dict.fromkeys(mark for text in texts for mark in _MARKUP.findall(text))
    return tuple(mark for mark in found if mark not in added)


def _named_ids(config: Any) -> set[int]:
    """Ids of tokens that a configuration names, such as image_token_id."""
    found: set[int] = set()
    for name, value in vars(config).items():
        if _ID_OF_A_TOKEN.search(name):
            found |= {i for i in (value if isinstance(value, list) else [value]) if i is not None}
    return found
