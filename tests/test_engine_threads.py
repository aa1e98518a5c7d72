"""One engine used by several threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from edgeprune.errors import SessionError
from edgeprune.runtime import Sampling, Session
from tests.engine_setups import NEXT, SHORT, Setup, questions

ASKS = 600


def in_threads(work: Callable[[int], None]) -> None:
    """`work(0)` and `work(1)` at the same time; what either raises is raised."""
    raised: list[BaseException] = []
    start = threading.Barrier(2)

    def run(number: int) -> None:
        start.wait()
        try:
            work(number)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=[number]) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]


def test_two_threads_with_a_session_each_answer_as_two_engines(engine_setup: Setup) -> None:
    """Questions and follow-ups; `ASKS` on ONNX Runtime, a tenth on the slower stand-in."""
    session = engine_setup.session()
    wanted = [
        (session.ask(*one, SHORT).ids, session.follow_up(NEXT, SHORT).ids) for one in questions()
    ]
    assert len(set(wanted)) > 1
    engine, count = engine_setup.engine(), ASKS if engine_setup.backend == "ort-cpu" else ASKS // 10
    wrong = []

    def work(number: int) -> None:
        session = Session(engine)
        for index in range(number, count // 2, 2):
            one = index % len(wanted)
            ids = session.ask(*questions()[one], SHORT).ids, session.follow_up(NEXT, SHORT).ids
            if ids != wanted[one]:
                wrong.append(ids)

    in_threads(work)
    assert not wrong


def test_two_threads_with_one_session_get_right_answers_or_session_errors(
    pruned_setup: Setup,
) -> None:
    session = pruned_setup.session()
    wanted = [session.ask(*one, SHORT).ids for one in questions()]
    right, refused, wrong = [], [], []

    def work(number: int) -> None:
        for index in range(ASKS // 2):
            one = (index + number) % len(wanted)
            try:
                ids = session.ask(*questions()[one], SHORT).ids
            except SessionError as error:
                refused.append(str(error))
            else:
                (right if ids == wanted[one] else wrong).append(ids)

    in_threads(work)
    assert not wrong
    assert right and len(right) + len(refused) == ASKS
    assert all("give each thread a session of its own" in line for line in refused)
    assert session.ask(*questions()[0], SHORT).ids == wanted[0]


def test_closing_waits_for_the_call_that_runs(pruned_setup: Setup) -> None:
    """And the thread that called goes on to a SessionError."""
    session, running, ended = pruned_setup.session(), threading.Event(), list[Exception]()
    backend = session.engine.backend
    run = backend.run

    def slow(inputs: Any, caches: Any) -> Any:
        running.set()
        assert not threading.Event().wait(0.1)
        return run(inputs, caches)

    backend.run = slow  # type: ignore[method-assign]

    def ask() -> None:
        try:
            session.ask(*questions()[0], Sampling(max_new_tokens=50))
        except SessionError as error:
            ended.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    running.wait()
    session.engine.close()
    thread.join()
    assert "closed" in str(ended[0])
