"""How answers are drawn. Settings have the names and the meaning of transformers' GenerationConfig.

A checkpoint's own settings are checked with this class at export and stored in the manifest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Annotated, Any

from edgeprune.errors import SpecError
from edgeprune.records import Amount, Between

WORDS = 1 << 14
"""Bad words at most: each is looked at before each token."""

Penalty = Annotated[float, Between(1e-9, 1 << 30)]
Probability = Annotated[float, Between(0, 1)]
Length = Annotated[int, Between(1, 1 << 40)]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn; the default is greedy. SpecError where a value cannot be used.

    top_k, top_p, min_p and the seed act on drawn answers only, all others on greedy ones too.
    The ranges beside the types hold where a manifest is read.
    """

    temperature: Annotated[float, Between(0, 1 << 30)] = 0.0  # 0 takes the likeliest token
    top_k: Amount = 0  # only the k likeliest tokens; 0: all
    top_p: Probability = 1.0  # only the likeliest tokens that together reach this probability
    seed: Amount = 0
    stop: tuple[str, ...] = ()  # an answer ends before the first of these strings
    max_new_tokens: Length | None = None  # None: the bundle's own number, fewer where fewer fit
    min_p: Probability = 0.0  # only tokens with this share of the likeliest one's probability
    repetition_penalty: Penalty = 1.0  # above 1: less of what the dialogue holds already
    no_repeat_ngram_size: Amount = 0  # no run of so many tokens comes twice; 0: any may
    bad_words_ids: tuple[tuple[Amount, ...], ...] = ()  # runs of tokens that are never completed
    min_length: Amount = 0  # no end before the dialogue has so many tokens, the image's included
    min_new_tokens: Amount = 0  # no end before the answer has so many tokens
    suppress_tokens: tuple[Amount, ...] = ()  # tokens that are never taken
    begin_suppress_tokens: tuple[Amount, ...] = ()  # tokens that are not an answer's first
    max_length: Length | None = None  # of the dialogue; only where max_new_tokens is None

    def __post_init__(self) -> None:
        for name, (holds, rule) in _RULES.items():
            if not holds(value := getattr(self, name)):
                raise SpecError(f"{rule}; got {_shown(value)}")


def _number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def _count(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= 0


def _length(value: Any) -> bool:
    return value is None or (_count(value) and value > 0)


def _probability(value: Any) -> bool:
    return _number(value) and 0 <= value <= 1


def _ids(value: Any) -> bool:
    return isinstance(value, tuple) and all(_count(i) and i < 1 << 32 for i in value)


def _words(value: Any) -> bool:
    few = isinstance(value, tuple) and len(value) <= WORDS
    return few and all(_ids(word) and word for word in value)


def _texts(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(text, str) and text for text in value)


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (
        lambda value: _number(value) and value >= 0,
        "the temperature is 0 (greedy) or a positive number",
    ),
    "top_k": (_count, "top-k is a number of tokens, 0 for all"),
    "top_p": (_probability, "top-p is a probability from 0 to 1"),
    "min_p": (_probability, "min-p is a probability from 0 to 1"),
    "repetition_penalty": (
        lambda value: _number(value) and value > 0,
        "the repetition penalty is above 0, 1 for none",
    ),
    "no_repeat_ngram_size": (_count, "no_repeat_ngram_size is a number of tokens from 0"),
    "min_length": (_count, "min_length is a number of tokens from 0"),
    "min_new_tokens": (_count, "min_new_tokens is a number of tokens from 0"),
    "max_length": (_length, "max_length is a number of tokens from 1"),
    "max_new_tokens": (_length, "max_new_tokens: an answer has at least 1 token"),
    "suppress_tokens": (_ids, "suppress_tokens is a tuple of token ids"),
    "begin_suppress_tokens": (_ids, "begin_suppress_tokens is a tuple of token ids"),
    "bad_words_ids": (_words, f"bad_words_ids is a tuple of {WORDS} tuples of token ids at most"),
    "seed": (_count, "the seed is a whole number from 0"),
    "stop": (_texts, "stop strings come in a tuple and none is empty"),
}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
