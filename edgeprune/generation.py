"""How answers are drawn. Settings have the names and the meaning of transformers' GenerationConfig.

A checkpoint's own settings are checked with this class at export and stored in the manifest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Annotated, Any

from edgeprune.errors import SpecError
from edgeprune.records import Amount, Between

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
    min_p: Probability = (
        0.0  # only tokens with at least this share of the likeliest one's probability
    )
    repetition_penalty: Annotated[float, Between(1e-9, 1 << 30)] = (
        1.0  # above 1: less of what the dialogue holds already
    )
    no_repeat_ngram_size: Amount = 0  # no run of so many tokens comes twice; 0: any may
    bad_words_ids: tuple[tuple[Amount, ...], ...] = ()  # runs of tokens that are never completed
    min_length: Amount = 0  # no end before the dialogue has so many tokens, the image's included
    min_new_tokens: Amount = 0  # no end before the answer has so many tokens
    suppress_tokens: tuple[Amount, ...] = ()  # tokens that are never taken
    begin_suppress_tokens: tuple[Amount, ...] = ()  # tokens that are not an answer's first
    max_length: Length | None = None  # of the dialogue; only where max_new_tokens is None

    def __post_init__(self) -> None:
        _require(
            _number(self.temperature) and self.temperature >= 0,
            f"the temperature is 0 (greedy) or a positive number; got {self.temperature!r}",
        )
        _require(_count(self.top_k), f"top-k is a number of tokens, 0 for all; got {self.top_k!r}")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            _require(
                _number(value) and 0 <= value <= 1,
                f"{name.replace('_', '-')} is a probability from 0 to 1; got {value!r}",
            )
        _require(
            _number(self.repetition_penalty) and self.repetition_penalty > 0,
            f"the repetition penalty is above 0, 1 for none; got {self.repetition_penalty!r}",
        )
        _require(_count(self.seed), f"the seed is a whole number from 0; got {self.seed!r}")
        _require(
            isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop),
            f"stop strings come in a tuple and none is empty; got {self.stop!r}",
        )
        for name in ("no_repeat_ngram_size", "min_length", "min_new_tokens"):
            value = getattr(self, name)
            _require(_count(value), f"{name} is a number of tokens from 0; got {value!r}")
        for name in ("max_new_tokens", "max_length"):
            value = getattr(self, name)
            _require(
                value is None or (_count(value) and value >= 1),
                f"{name}: an answer has at least 1 token; got {value!r}",
            )
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            value = getattr(self, name)
            _require(_ids(value), f"{name} is a tuple of token ids; got {value!r}")
        _require(
            isinstance(self.bad_words_ids, tuple) and all(map(_word, self.bad_words_ids)),
            f"bad_words_ids is a tuple of tuples of token ids; got {self.bad_words_ids!r}",
        )


def _number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def _count(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= 0


def _ids(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(_count, value))


def _word(value: Any) -> bool:
    return _ids(value) and len(value) > 0


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise SpecError(message)
