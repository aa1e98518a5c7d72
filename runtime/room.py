"""How many tokens an answer may have: what was asked for, the checkpoint's own, what fits."""

from __future__ import annotations

from edgeprune.errors import CapacityError
from edgeprune.generation import Sampling
from edgeprune.runtime.sequence import Sequence

LONGEST = 512
"""Tokens of an answer at most, where neither caller nor checkpoint says a number."""


def room(sequence: Sequence, text: int, sampling: Sampling | None, span: int | None = None) -> int:
    """How many tokens may be said after `text` tokens, behind an image that takes `span` positions,
    or where that is None behind what was read.

    CapacityError where there is no room for one, or for as many as are wanted.
    """
    engine = sequence.engine
    wanted = sampling.max_new_tokens if sampling else None
    if span is not None:
        fitting = engine.room(0, 0, text, span, wanted)
    else:
        fitting = engine.room(sequence.position, sequence.text_tokens, text, 0, wanted)
    if wanted is not None:
        return wanted
    before = sequence.ids.size if span is None else engine.visual_ids.size
    return min(fitting, _longest(engine.manifest.text.generation, sampling, text + before))


def _longest(own: Sampling, sampling: Sampling | None, before: int) -> int:
    """How many tokens an answer has at most where none was asked for; `before` stand first."""
    length = (sampling or own).max_length
    if own.max_new_tokens is not None or length is None:
        return own.max_new_tokens or LONGEST
    if before >= length:
        raise CapacityError(
            f"the dialogue has {before} tokens (the image's included), max_length is {length};"
            " shorten the prompt, or ask for --max-new-tokens"
        )
    return length - before
