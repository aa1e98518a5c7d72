"""Several bundles: which are in memory, one that is replaced, and what systemd is told."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeprune.bundle import MANIFEST
from edgeprune.runtime import Engine, Session
from edgeprune.serve import systemd
from edgeprune.serve.images import ImageDoors
from edgeprune.serve.memory import Memory
from edgeprune.serve.messages import conversation
from edgeprune.serve.model import Finished, Piece, ServedBundle
from edgeprune.serve.request import ChatRequest
from edgeprune.serve.scheduler import Job
from tests.server import LONG, NEXT, QUESTION, SCENE, Server, asked, chat, refusal, running, went_on

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
pytest.importorskip("starlette")


class Thing:
    """A holder of memory that remembers whether it is there."""

    def __init__(self, size: int) -> None:
        self.size, self.unloaded = size, 0

    def unload(self) -> None:
        self.unloaded += 1


def test_the_longest_unused_idle_holder_makes_room() -> None:
    memory, first, second, third = Memory(10), Thing(4), Thing(4), Thing(5)
    for holder in (first, second, first):
        with memory.using(holder):
            pass
    with memory.using(third):
        assert (first.unloaded, second.unloaded) == (0, 1)
        with memory.using(first), memory.using(first):
            pass
        with memory.using(second):
            assert (first.unloaded, third.unloaded) == (1, 0)
    memory.forget(third)
    with memory.using(first), memory.using(second):
        assert first.unloaded == 1


def test_a_holder_waits_until_another_is_idle() -> None:
    memory, busy, other = Memory(10), Thing(8), Thing(8)
    entered = threading.Event()

    def enter() -> None:
        with memory.using(other):
            entered.set()

    with memory.using(busy):
        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.05) and not busy.unloaded
    thread.join(10)
    assert entered.is_set() and busy.unloaded == 1


def test_those_that_wait_are_served_in_order() -> None:
    """A holder that is asked again and again lets another one in between."""
    memory, order = Memory(10), list[str]()
    holders = {name: Thing(8) for name in ("busy", "second", "third")}

    def enter(name: str) -> None:
        with memory.using(holders[name]):
            order.append(name)

    threads = list[threading.Thread]()
    with memory.using(holders["busy"]):
        for name in ("second", "third", "busy"):
            inside = name == "busy"
            enter(name) if inside else threads.append(threading.Thread(target=enter, args=[name]))
            if not inside:
                threads[-1].start()
                while len(memory._waiting) < len(threads):
                    time.sleep(0.001)
    enter("busy")  # which has left, and comes last
    for thread in threads:
        thread.join(10)
    assert order == ["busy", "second", "third", "busy"]
    assert not memory.contended


def test_a_bundle_that_is_never_idle_makes_room_all_the_same(demo_fastv: Path) -> None:
    memory = Memory(10)
    busy, other = (
        ServedBundle(lambda: Engine.open(demo_fastv, threads=1), 2, 8, memory, 6) for _ in range(2)
    )
    talk, stop = conversation(asked(QUESTION), ImageDoors(1 << 20)), threading.Event()
    said = queue.SimpleQueue[object]()
    long = ChatRequest("demo", talk, {"min_new_tokens": 40, "max_new_tokens": 40}, ())

    def again(event: object) -> None:
        """Whatever ends is asked anew, so two are always under way."""
        if not isinstance(event, Piece | Finished) and not stop.is_set():
            busy.scheduler.submit(Job(lambda: busy.answer(long), again))

    for _ in range(4):
        busy.scheduler.submit(Job(lambda: busy.answer(long), again))
    while busy.scheduler.running < 2:
        time.sleep(0.001)
    other.scheduler.submit(Job(lambda: other.answer(ChatRequest("demo", talk, {}, ())), said.put))
    try:
        while not isinstance(event := said.get(timeout=20), Finished):
            assert isinstance(event, Piece)
    finally:
        stop.set()
        busy.close()
        other.close()
    assert event.text == "5"


def test_a_bundle_that_made_room_answers_again(demo_fastv: Path) -> None:
    memory = Memory(10)
    pair = [
        ServedBundle(lambda: Engine.open(demo_fastv, threads=1), 2, 4, memory, 6) for _ in range(2)
    ]

    def answered(bundle: ServedBundle, messages: Any) -> Finished:
        talk = conversation(messages, ImageDoors(1 << 20))
        *_, finished = bundle.answer(ChatRequest("demo", talk, {}, choices=()))
        assert isinstance(finished, Finished)
        return finished

    assert [bundle.loaded for bundle in pair] == [False, True]
    first = answered(pair[0], asked(QUESTION))
    assert (first.text, [bundle.loaded for bundle in pair]) == ("5", [True, False])
    answered(pair[1], asked(QUESTION))
    later = answered(pair[0], went_on(asked(QUESTION), "5", NEXT))
    with Session.open(demo_fastv, threads=1) as session:
        session.ask(SCENE, QUESTION)
        assert later.text == session.follow_up(NEXT).text
    assert later.usage.cached == 0, "it was read again"
    for bundle in pair:
        bundle.close()


def test_waiting_for_room_is_no_step_of_the_engine(demo_fastv: Path) -> None:
    memory, busy = Memory(10), Thing(8)
    bundle = ServedBundle(lambda: Engine.open(demo_fastv, threads=1), 2, 4, memory, 6)
    talk = conversation(asked(QUESTION), ImageDoors(1 << 20))
    events = queue.SimpleQueue[object]()
    job = Job(lambda: bundle.answer(ChatRequest("demo", talk, {}, choices=())), events.put)
    with memory.using(busy):
        bundle.scheduler.submit(job)
        with pytest.raises(queue.Empty):
            events.get(timeout=0.1)
        assert bundle.scheduler.running and bundle.scheduler.step_seconds == 0
    while not isinstance(event := events.get(timeout=10), Finished):
        assert not isinstance(event, Exception)
    bundle.close()


@pytest.fixture
def folder(demo_fastv: Path, tmp_path: Path) -> Path:
    """A link to a bundle, as a service has it."""
    link = tmp_path / "served"
    link.symlink_to(demo_fastv)
    return link


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with running(folder) as server:
        yield server


def turned(link: Path, target: Path) -> None:
    """The link leads elsewhere, all at once."""
    new = link.with_name("new")
    new.symlink_to(target)
    new.replace(link)


def replaced(server: Server) -> str:
    """What the server says after it was told to look."""
    server.process.send_signal(signal.SIGHUP)
    assert server.process.stderr is not None
    return server.process.stderr.readline()


def test_a_bundle_is_replaced_and_rolled_back_while_it_answers(
    server: Server, folder: Path, demo_fastv: Path, demo_dense: Path, tmp_path: Path
) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as client:

        def names() -> list[str]:
            return [model["id"] for model in client.get("/v1/models").json()["data"]]

        (first,) = names()
        texts = list[str]()

        def stream() -> None:
            with httpx.Client(base_url=server.url, timeout=60) as other:
                texts.append(chat(other, stream=True, max_tokens=150, **LONG).text)

        thread = threading.Thread(target=stream)
        thread.start()
        while not any(
            line.startswith("edgeprune_running") and line.endswith(" 1")
            for line in client.get("/metrics").text.splitlines()
        ):
            time.sleep(0.01)
        turned(folder, demo_dense)
        assert "is replaced by" in replaced(server)
        (second,) = names()
        assert second != first
        thread.join()
        assert texts[0].endswith("data: [DONE]\n\n"), "the old one answers to the end"
        assert chat(client, model=second).json()["choices"][0]["message"]["content"] == "5"
        assert "there is no model" in refusal(chat(client, model=first), 404)
        broken = Path(shutil.copytree(demo_fastv, tmp_path / "broken"))
        (broken / "decoder.onnx").write_bytes(b"no graph")
        turned(folder, broken)
        # it differs on disk, though its manifest is the first bundle's
        assert f"{second} stays as it was" in replaced(server)
        assert names() == [second]
        turned(folder, demo_fastv)
        assert f"{second} is replaced by {first}" in replaced(server)
        assert chat(client, model=first).json()["choices"][0]["message"]["content"] == "5"
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0


def test_more_than_fits_is_refused_at_the_start(
    demo_fastv: Path, refused: Any, tmp_path: Path
) -> None:
    assert "--memory is 1; give more" in refused("serve", demo_fastv, "--memory", 1)
    assert "--memory is a number" in refused("serve", demo_fastv, "--memory", 0)
    shutil.copy(demo_fastv / MANIFEST, tmp_path)  # its weights are in engines alone
    assert "--memory is 1; give more" in refused("serve", tmp_path, "--memory", 1)


def test_systemd_is_told(demo_fastv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "200000")
        with running(demo_fastv) as server:
            told = [listener.recv(100) for _ in range(3)]
            assert sorted(told) == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1"]
            server.process.send_signal(signal.SIGTERM)
            while (last := listener.recv(100)) == b"WATCHDOG=1":
                pass
            assert last == b"STOPPING=1"


def test_a_call_that_hangs_gets_no_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    told = list[str]()
    monkeypatch.setattr(systemd, "notify", told.append)
    monkeypatch.setenv("WATCHDOG_USEC", "40000")
    steps = iter([0.0, 0.01, 5.0, 5.0, 5.0, 5.0])

    async def watch() -> None:
        with pytest.raises(RuntimeError):  # the steps are over
            await systemd.watch(lambda: next(steps))

    asyncio.run(watch())
    assert told == ["WATCHDOG=1"] * 2
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid() + 1))
    assert systemd.watchdog_seconds() is None
