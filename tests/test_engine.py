"""One engine for many dialogues: each answers as on an engine of its own, or says why not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgeprune.errors import CapacityError, InputError, SessionError
from edgeprune.runtime import Sampling, Session
from tests.engine_setups import NEXT, SHORT, Setup, greedy, questions, steps


def test_sequences_of_one_engine_token_by_token_are_those_of_two(engine_setup: Setup) -> None:
    """70 tokens: caches cross a growth step, each sequence at another token."""
    alone = [list(steps(engine_setup.engine().sequence(), one, 70)) for one in questions()[:2]]
    assert alone[0] != alone[1]
    engine = engine_setup.engine()
    side_by_side = zip(*(steps(engine.sequence(), one, 70) for one in questions()[:2]), strict=True)
    assert [list(tokens) for tokens in zip(*side_by_side, strict=True)] == alone


def test_an_older_stream_ends_when_another_question_is_asked(pruned_setup: Setup) -> None:
    session, sampling = pruned_setup.session(), Sampling(max_new_tokens=12)
    first, second = questions()[:2]
    wanted = pruned_setup.session().ask(*second, sampling)
    older = session.stream(*first, sampling)
    next(older)
    newer = session.stream(*second, sampling)
    with pytest.raises(SessionError, match="this stream ended when another question was asked"):
        next(older)
    assert "".join(newer).strip() == wanted.text
    assert session.answer is not None and session.answer.ids == wanted.ids
    with pytest.raises(SessionError, match="this stream ended"):
        list(older)
    assert list(newer) == [], "a stream that is out stays so"


def test_a_stream_that_is_left_can_be_followed_up(engine_setup: Setup) -> None:
    """As if the answer had ended there; and nothing of it is left in the next dialogue."""
    first, sampling = questions()[0], Sampling(max_new_tokens=12)
    session, whole = engine_setup.session(), engine_setup.session()
    pieces = session.stream(*first, sampling)
    next(pieces)
    assert session.answer is None
    prefix_ids, text_ids = session.engine.prompter.first_turn(first[1])
    prompt = prefix_ids.size + session.engine.visual_ids.size + text_ids.size
    said = session.sequence.ids.size - prompt + len(session.sequence.pending)
    whole.ask(*first, Sampling(max_new_tokens=said))
    assert session.follow_up(NEXT, sampling).ids == whole.follow_up(NEXT, sampling).ids
    assert session.ask(*first, sampling).ids == whole.ask(*first, sampling).ids


def test_a_stream_that_was_never_begun_leaves_no_answer(pruned_setup: Setup) -> None:
    session = pruned_setup.session()
    session.stream(*questions()[0], SHORT)
    with pytest.raises(InputError, match="needs a first answer"):
        session.follow_up(NEXT)


def broken(session: Session, call: int, error: BaseException) -> None:
    """Have the n-th call of the decoder raise, once it is done."""
    backend, done = session.engine.backend, [0]
    run = backend.run

    def runs(inputs: Any, caches: Any) -> Any:
        output = run(inputs, caches)
        done[0] += 1
        if done[0] == call:
            backend.run = run  # type: ignore[method-assign]
            raise error
        return output

    backend.run = runs  # type: ignore[method-assign]


@pytest.mark.parametrize("call", [1, 4])
def test_a_session_says_that_its_answer_was_interrupted(engine_setup: Setup, call: int) -> None:
    first, sampling = questions()[0], Sampling(max_new_tokens=8)
    session, wanted = engine_setup.session(), engine_setup.session()
    broken(session, call, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        session.ask(*first, sampling)
    with pytest.raises(SessionError, match=r"broken off \(KeyboardInterrupt\); start again"):
        session.follow_up(NEXT)
    with pytest.raises(SessionError, match="broken off"):
        session.sequence.read(np.array([[5]]))
    assert session.ask(*first, sampling).ids == wanted.ask(*first, sampling).ids
    assert session.follow_up(NEXT, sampling).ids == wanted.follow_up(NEXT, sampling).ids


def test_a_sequence_says_that_a_call_was_interrupted(engine_setup: Setup) -> None:
    session, wanted = engine_setup.session(), engine_setup.engine().sequence()
    sequence, ids = session.sequence, np.arange(3, 20)[None]
    sequence.read(ids)
    broken(session, 1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        sequence.read(np.array([[7]]))
    for use in (lambda: sequence.read(np.array([[7]])), sequence.fork):
        with pytest.raises(SessionError, match="broken off before its end; start again"):
            use()
    sequence.reset()
    assert greedy(sequence, 7, 5) == greedy(wanted, 7, 5)


def test_what_is_refused_leaves_the_dialogue_as_it_was(pruned_setup: Setup) -> None:
    session, wanted = pruned_setup.session(), pruned_setup.session()
    too_many = session.manifest.decoder.max_positions
    assert session.ask(*questions()[0], SHORT).ids == wanted.ask(*questions()[0], SHORT).ids
    for refused, error in [
        (lambda: session.ask("no such file.png", NEXT), InputError),
        (
            lambda: session.ask(questions()[1][0], NEXT, Sampling(max_new_tokens=too_many)),
            CapacityError,
        ),
        (lambda: session.follow_up("  "), InputError),
        (lambda: session.follow_up("star " * too_many), CapacityError),
    ]:
        with pytest.raises(error):
            refused()
    assert session.follow_up(NEXT, SHORT).ids == wanted.follow_up(NEXT, SHORT).ids


def test_a_closed_session_says_so(engine_setup: Setup) -> None:
    first = questions()[0]
    with engine_setup.session() as session:
        session.ask(*first, SHORT)
        pieces = session.stream(*first, Sampling(max_new_tokens=12))
        next(pieces)
        engine = session.engine
    for use in (
        lambda: session.ask(*first),
        lambda: session.follow_up(NEXT),
        lambda: list(session.stream(*first)),
        lambda: list(session.stream_follow_up(NEXT)),
        lambda: list(pieces),
        session.reset,
        session.warm_up,
        session.sequence.fork,
    ):
        with pytest.raises(SessionError, match="closed"):
            use()
    session.close()
    other = Session(engine)  # the engine is its caller's
    other.ask(*first, SHORT)
    engine.close()
    with pytest.raises(SessionError, match="this engine is closed; open the bundle again"):
        other.ask(*first)
    other.close()
    with pytest.raises(SessionError, match="closed"):
        engine.sequence()
