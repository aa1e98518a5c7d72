"""Jobs in turn: the order, the bound of the queue, and the end of what nobody waits for."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from edgeprune.serve.errors import HttpError
from edgeprune.serve.exchange import GONE, answer
from edgeprune.serve.scheduler import DONE, Job, Scheduler


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    scheduler = Scheduler(running=2, waiting=2, name="test")
    yield scheduler
    scheduler.close()


class Work:
    """Yields numbers, a piece each time it is let go; remembers that it was closed."""

    def __init__(self, events: queue.Queue[Any], name: str, count: int | None) -> None:
        self.name, self.count, self.closed = name, count, False
        self.job = Job(self.pieces, lambda event: events.put((name, event)))

    def pieces(self) -> Generator[int, None, None]:
        try:
            number = 0
            while self.count is None or number < self.count:
                yield number
                number += 1
                time.sleep(0.001)
        finally:
            self.closed = True


def test_those_that_have_started_take_turns(scheduler: Scheduler) -> None:
    events: queue.Queue[Any] = queue.Queue()
    blocker = Work(events, "blocker", None)
    scheduler.submit(blocker.job)
    while scheduler.waiting:
        time.sleep(0.001)
    first, second = Work(events, "first", 3), Work(events, "second", 3)
    scheduler.submit(first.job)
    scheduler.submit(second.job)
    order = [e for e in iter(lambda: events.get(timeout=10), ("second", DONE)) if e[0] != "blocker"]
    pieces = [("first", n) for n in range(3)]
    assert order[:4] == [*pieces, ("first", DONE)], "the second waits: two run at once"
    assert not blocker.closed
    scheduler.cancel(blocker.job)


def test_what_nobody_waits_for_ends(scheduler: Scheduler) -> None:
    events: queue.Queue[Any] = queue.Queue()
    endless = [Work(events, str(n), None) for n in range(2)]
    waits, last = Work(events, "waits", 1), Work(events, "last", 1)
    for work in (*endless, waits, last):
        scheduler.submit(work.job)
        while scheduler.waiting and work in endless:
            time.sleep(0.001)
    with pytest.raises(HttpError) as caught:
        scheduler.submit(Work(events, "one more", 1).job)
    assert caught.value.status == 429 and int(caught.value.headers["Retry-After"]) >= 1
    scheduler.cancel(waits.job)
    assert scheduler.waiting == 1
    scheduler.cancel(endless[0].job)
    while events.get(timeout=10) != ("last", DONE):
        pass
    assert endless[0].closed and not endless[1].closed
    scheduler.cancel(endless[1].job)
    while scheduler.running:
        time.sleep(0.001)
    assert endless[1].closed


class Bundle:
    """Stands for a bundle whose answers never end."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler, self.closed = scheduler, False

    def answer(self, request: Any) -> Generator[str, None, None]:
        try:
            while True:
                yield "a"
                time.sleep(0.001)
        finally:
            self.closed = True


@pytest.mark.parametrize(("leaves", "seconds"), [(True, 60.0), (False, 0.05)])
def test_an_answer_ends_with_its_client_or_its_time(
    leaves: bool, seconds: float, scheduler: Scheduler
) -> None:
    bundle: Any = Bundle(scheduler)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.05 if leaves else 60)
        return {"type": "http.disconnect"}

    async def read() -> None:
        async for piece in answer(bundle, None, receive, seconds):  # type: ignore[arg-type]
            assert piece == "a"

    with pytest.raises(GONE if leaves else HttpError):
        asyncio.run(read())
    while scheduler.running:
        time.sleep(0.001)
    assert bundle.closed


def test_jobs_that_are_left_at_the_end_are_told() -> None:
    scheduler, events = Scheduler(running=1, waiting=2, name="test"), queue.Queue[Any]()
    endless, waits = Work(events, "endless", None), Work(events, "waits", 1)
    scheduler.submit(endless.job)
    scheduler.submit(waits.job)
    scheduler.close()
    told = [event for event in events.queue if isinstance(event[1], HttpError)]
    assert [(name, error.status) for name, error in told] == [("endless", 503), ("waits", 503)]
    with pytest.raises(HttpError, match="is stopping"):
        scheduler.submit(waits.job)
