"""A turn -> its answer, token by token and as text that grows."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator

from edgeprune.runtime.answer import Answer, Turn
from edgeprune.runtime.sampling import Sampler, StopWatcher
from edgeprune.runtime.sequence import Sequence


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
    )


def _tokens(sequence: Sequence, turn: Turn) -> Iterator[int]:
    """Ids of the answer as they are picked, the end token left out; fills `turn.said`."""
    engine, said, clock = sequence.engine, turn.said, time.perf_counter
    before = sequence.ids.size + turn.prompt_tokens
    before += engine.visual_ids.size if turn.image else 0
    sampler = Sampler(turn.sampling, engine.manifest.text.eos_token_ids, before, turn.grammar)
    known, started = sampler.takes_likeliest, clock()
    output = sequence.read(turn.text_ids, turn.prefix_ids, turn.image, logits=not known)
    turn.timings.prefill = 1e3 * (clock() - started)
    while True:
        logits = output.logits
        token = output.token if logits is None else sampler.pick(logits, sequence.ids)
        said.append(token)
        if _is_end(sequence, said):
            return
        sequence.pending = [token]
        yield token
        if len(said) == turn.room:
            return
        started = clock()
        output = sequence.read(logits=not known)
        turn.timings.decode.append(1e3 * (clock() - started))


def _is_end(sequence: Sequence, said: list[int]) -> bool:
    return bool(said) and said[-1] in sequence.engine.manifest.text.eos_token_ids
