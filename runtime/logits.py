"""The logits processors of transformers in numpy: what a setting forbids or makes less likely.

A processor is a function with the name of its setting in `Sampling`. It changes the scores of all
tokens, float32 [vocabulary], in place. To add one, write the function and list it in PROCESSORS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from edgeprune.generation import Sampling

Ids = NDArray[np.int64]
Scores = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Context:
    """What stands before the token that is to be chosen, as `generate` has it in `input_ids`."""

    ids: Ids  # [n], the dialogue so far; an image is its placeholder, once for each visual token
    answered: int  # how many of them are of this answer
    ends: Sequence[int]  # tokens that end an answer


def repetition_penalty(scores: Scores, penalty: float, context: Context) -> None:
    """Tokens of the dialogue are less likely (Keskar et al. 2019, section 4.1)."""
    ids = context.ids[context.ids < scores.size]
    found = scores[ids]
    scores[ids] = np.where(found < 0, found * penalty, found / penalty)


def no_repeat_ngram_size(scores: Scores, size: int, context: Context) -> None:
    """No token that would complete a run of `size` tokens which the dialogue holds already."""
    if context.ids.size < size:
        return
    begun = context.ids[context.ids.size + 1 - size :]
    runs = sliding_window_view(context.ids, size)
    _forbid(scores, runs[(runs[:, :-1] == begun).all(axis=1), -1])


def bad_words_ids(scores: Scores, words: Sequence[Sequence[int]], context: Context) -> None:
    """No token that would complete one of the words; the end of an answer is never a bad word."""
    for *begun, last in words:
        alone = not begun and last in context.ends
        if not alone and context.ids[context.ids.size - len(begun) :].tolist() == begun:
            _forbid(scores, [last])


def min_length(scores: Scores, length: int, context: Context) -> None:
    """No end before the dialogue, prompt and image included, has `length` tokens."""
    if context.ids.size < length:
        _forbid(scores, context.ends)


def min_new_tokens(scores: Scores, count: int, context: Context) -> None:
    """No end before the answer has `count` tokens."""
    if context.answered < count:
        _forbid(scores, context.ends)


def suppress_tokens(scores: Scores, tokens: Ids, context: Context) -> None:
    """These tokens are never taken."""
    _forbid(scores, tokens)


def begin_suppress_tokens(scores: Scores, tokens: Ids, context: Context) -> None:
    """These tokens are not the first of an answer."""
    if not context.answered:
        _forbid(scores, tokens)


Processor = Callable[[Scores, Any, Context], None]

PROCESSORS: tuple[Processor, ...] = (
    repetition_penalty,
    no_repeat_ngram_size,
    bad_words_ids,
    min_length,
    min_new_tokens,
    suppress_tokens,
    begin_suppress_tokens,
)
"""In the order in which `generate` applies them."""


def active(sampling: Sampling) -> list[tuple[Processor, Any]]:
    """The processors that a sampling turns on, each with its setting; ids are arrays."""
    neutral, found = Sampling(), []
    for processor in PROCESSORS:
        setting = getattr(sampling, processor.__name__)
        if setting != getattr(neutral, processor.__name__):
            ids = isinstance(setting, tuple) and processor is not bad_words_ids
            found.append((processor, np.array(setting) if ids else setting))
    return found


def _forbid(scores: Scores, ids: Sequence[int] | Ids) -> None:
    """Ids that the model has no logit for are left alone, as in transformers."""
    ids = np.asarray(ids, np.int64)
    scores[ids[ids < scores.size]] = -np.inf
