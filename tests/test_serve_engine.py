"""A bundle that is served goes on after its engine has failed; one thread, no socket."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from edgeprune.errors import BackendError, SessionError
from edgeprune.runtime import Engine, Session
from edgeprune.serve.errors import http_error
from edgeprune.serve.images import ImageDoors
from edgeprune.serve.messages import conversation
from edgeprune.serve.model import Finished, ServedBundle
from edgeprune.serve.request import ChatRequest
from tests.server import NEXT, OTHER, QUESTION, SCENE, asked, went_on


class Engines:
    """Opens engines, but for the next `refused` ones."""

    def __init__(self, path: Path, patch: pytest.MonkeyPatch) -> None:
        self.path, self.patch = path, patch
        self.opened = list[Engine]()
        self.refused = 0

    def __call__(self) -> Engine:
        if self.refused:
            self.refused -= 1
            raise BackendError("there is no device")
        self.opened.append(Engine.open(self.path, threads=1))
        return self.opened[-1]

    def break_down(self, calls: int) -> None:
        """So many calls of the decoder fail from here on."""
        backend, left = self.opened[-1].backend, [calls]
        run = backend.run

        def failing(*arguments: Any) -> Any:
            if left[0]:
                left[0] -= 1
                raise BackendError("the device is lost")
            return run(*arguments)

        self.patch.setattr(backend, "run", failing)


@pytest.fixture
def engines(demo_fastv: Path, monkeypatch: pytest.MonkeyPatch) -> Engines:
    return Engines(demo_fastv, monkeypatch)


@pytest.fixture
def bundle(engines: Engines) -> Iterator[ServedBundle]:
    bundle = ServedBundle(engines, 2, 4)
    yield bundle
    bundle.close()


def request(messages: Any, **settings: int) -> ChatRequest:
    talk = conversation(messages, ImageDoors(1 << 20))
    return ChatRequest("demo", talk, settings, choices=())


def answered(bundle: ServedBundle, messages: Any) -> Finished:
    *_, finished = bundle.answer(request(messages))
    assert isinstance(finished, Finished)
    return finished


def test_a_call_that_fails_ends_one_answer_alone(engines: Engines, bundle: ServedBundle) -> None:
    kept = answered(bundle, asked(QUESTION))
    engines.break_down(1)
    with pytest.raises(BackendError, match="the device is lost"):
        answered(bundle, asked(QUESTION, OTHER))
    assert len(engines.opened) == 1
    later = answered(bundle, went_on(asked(QUESTION), kept.text, NEXT))
    assert later.usage.cached > 144, "the other dialogue is still there"


def test_an_engine_that_fails_is_opened_again(
    engines: Engines, bundle: ServedBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = answered(bundle, asked(QUESTION))
    wanted = answered(bundle, went_on(asked(QUESTION), kept.text, NEXT))
    running = bundle.answer(request(asked(QUESTION), max_new_tokens=50, min_new_tokens=50))
    next(running)
    engines.break_down(1000)
    with pytest.raises(BackendError, match="the device is lost"):
        answered(bundle, asked(QUESTION, OTHER))
    assert capsys.readouterr().err == (
        "edgeprune: demo-fastv: the engine failed (BackendError); it is opened again\n"
    )
    assert len(engines.opened) == 2 and not bundle.failure
    with pytest.raises(SessionError) as caught:
        list(running)
    assert http_error(caught.value).status == 503
    again = answered(bundle, went_on(asked(QUESTION), kept.text, NEXT))
    assert (again.text, again.usage.cached) == (wanted.text, 0)
    texts = {answered(bundle, asked(QUESTION, OTHER)).text for _ in range(3)}
    assert len(texts) == 1, "no sequence was lost"


def test_turns_are_read_again_as_the_tokens_that_were_said(bundle: ServedBundle) -> None:
    """Not as what a tokenizer makes of their text."""
    dialogues, talk = bundle.dialogues, conversation(asked(QUESTION), ImageDoors(1 << 20))
    opened = dialogues.open(talk)
    assert opened.image is not None
    opened.session.ask(opened.image, QUESTION)
    dialogues.keep(opened.session, talk.after("5"), (9, 8, 7))
    for image in (SCENE, OTHER):
        answered(bundle, asked(NEXT, image))
    later = conversation(went_on(asked(QUESTION), "5", NEXT), ImageDoors(1 << 20))
    again = dialogues.open(later)
    assert (again.cached, again.session.sequence.pending) == (0, [9, 8, 7])
    dialogues.drop(again.session)


def test_dialogues_are_kept_while_their_caches_fit(engines: Engines, demo_fastv: Path) -> None:
    """More than answer at a time; the one that was not used for longest makes room."""
    with Session.open(demo_fastv, threads=1) as session:
        session.ask(SCENE, QUESTION)
        one = session.sequence.cache_bytes()
    firsts = [asked(QUESTION), asked(NEXT), asked(QUESTION, OTHER)]
    for room, kept in ((0, 1), (2 * one + one // 2, 2), (4 * one, 3)):
        with closing(ServedBundle(engines, 1, 4, kept_bytes=room)) as bundle:
            for talk in firsts:
                text = answered(bundle, talk).text
            assert bundle.dialogues.evicted == 3 - kept
            again = answered(bundle, went_on(talk, text, NEXT))
            assert (again.usage.cached > 144, bundle.dialogues.continued) == (True, 1)


def test_caches_that_find_no_memory_cost_no_place(
    engines: Engines, bundle: ServedBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = engines.opened[0].backend
    caches, full = backend.caches, [True]

    def full_once() -> Any:
        if full:
            full.clear()
            raise BackendError("out of memory")
        return caches()

    monkeypatch.setattr(backend, "caches", full_once)
    with pytest.raises(BackendError, match="out of memory"):
        answered(bundle, asked(QUESTION))
    assert len(engines.opened) == 1
    for image in (SCENE, OTHER, SCENE, OTHER):
        answered(bundle, asked(QUESTION, image))
    running = [bundle.answer(request(asked(QUESTION, image))) for image in (SCENE, OTHER)]
    assert [next(one) for one in running], "two at once, as many as there are sequences"


def test_where_it_cannot_be_opened_each_request_tries(
    engines: Engines, bundle: ServedBundle
) -> None:
    engines.break_down(1000)
    engines.refused = 2
    with pytest.raises(BackendError, match="the device is lost"):
        answered(bundle, asked(QUESTION))
    assert bundle.failure == "the engine failed (BackendError)"
    with pytest.raises(BackendError, match="there is no device"):
        answered(bundle, asked(QUESTION))
    assert answered(bundle, asked(QUESTION)).text == "5"
    assert not bundle.failure
