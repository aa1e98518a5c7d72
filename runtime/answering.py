"""A turn -> its answer, token by token and as text that grows."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np

from edgeprune.errors import SpecError
from edgeprune.runtime.answer import Answer, TokenScore, Turn
from edgeprune.runtime.choosing import log_probabilities
from edgeprune.runtime.sampling import Sampler, StopWatcher
from edgeprune.runtime.sequence import Sequence
from edgeprune.runtime.text import Prompter

MOST = 20
"""Of the likeliest tokens that are told for each that was said."""


def pieces(sequence: Sequence, turn: Turn) -> Generator[str, None, Answer]:
    """The text of an answer as it grows; returns the whole. The sequence reads the question when
    the first piece is asked for."""
    watcher, text = StopWatcher(turn.sampling.stop), ""
    for piece in sequence.engine.prompter.pieces(_tokens(sequence, turn)):
        if ready := watcher.feed(piece):
            text += ready
            yield ready
        if watcher.stopped:
            break
    if rest := watcher.finish():
        text += rest
        yield rest
    said = turn.said
    ended = watcher.stopped or len(said) < turn.room or _is_end(sequence, said)
    return Answer(
        text.strip(),
        tuple(said),
        "stop" if ended else "length",
        turn.timings,
        sequence.vision_kept,
        sequence.layer_kept,
        turn.prompt_tokens,
        sequence.warnings,
        tuple(turn.scores),
    )


def _tokens(sequence: Sequence, turn: Turn) -> Iterator[int]:
    """Ids of the answer as they are picked, the end token left out; fills `turn.said`."""
    engine, said, clock = sequence.engine, turn.said, time.perf_counter
    before = sequence.ids.size + turn.prompt_tokens
    before += engine.visual_ids.size if turn.image else 0
    sampler = Sampler(turn.sampling, engine.manifest.text.eos_token_ids, before, turn.grammar)
    known, started = sampler.takes_likeliest and turn.top is None, clock()
    output = sequence.read(turn.text_ids, turn.prefix_ids, turn.image, logits=not known)
    turn.timings.prefill = 1e3 * (clock() - started)
    while True:
        logits = output.logits
        token = output.token if logits is None else sampler.pick(logits, sequence.ids)
        said.append(token)
        if _is_end(sequence, said):
            return
        sequence.pending = [token]
        if turn.top is not None:
            turn.scores.append(_score(engine.prompter, said, logits, turn.top))
        yield token
        if len(said) == turn.room:
            return
        started = clock()
        output = sequence.read(logits=not known)
        turn.timings.decode.append(1e3 * (clock() - started))


def check_count(top: int | None, vocabulary: int) -> None:
    """SpecError unless so many of the likeliest tokens can be told."""
    if top is not None and not 0 <= top <= min(MOST, vocabulary - 1):
        raise SpecError(f"log-probabilities are told of up to {MOST} tokens; got {top}")


def _score(prompter: Prompter, said: list[int], logits: Any, top: int) -> TokenScore:
    """Of the token said last, before settings of generation change anything."""
    found = log_probabilities(logits)

    def score(token: int, likeliest: tuple[TokenScore, ...] = ()) -> TokenScore:
        text = prompter.continued(said[-2:-1], token)
        return TokenScore(token, text, float(found[token]), likeliest)

    best = np.argpartition(-found, top)[:top] if top else np.zeros(0, np.int64)
    ordered = sorted(best.tolist(), key=lambda token: (-found[token], token))
    return score(said[-1], tuple(map(score, ordered)))


def _is_end(sequence: Sequence, said: list[int]) -> bool:
    return bool(said) and said[-1] in sequence.engine.manifest.text.eos_token_ids
