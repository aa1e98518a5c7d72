"""Jobs in turn on one thread: a bounded queue, and a bounded number that go on side by side.

An engine runs one call at a time. Jobs start in the order in which they came; those that have
started take turns, a piece of the answer each, so that a short answer does not wait for a long one.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from edgeprune.serve.errors import HttpError

DONE = object()
"""The last event of a job that ended well; of one that did not, it is the exception."""


class Job:
    """One request's work; its events go to `deliver`, from the scheduler's thread."""

    def __init__(
        self, work: Callable[[], Generator[Any, None, None]], deliver: Callable[[Any], None]
    ) -> None:
        self._work, self._deliver = work, deliver
        self._events: Generator[Any, None, None] | None = None
        self.cancelled, self.seconds = False, 0.0  # that it ran

    def advance(self) -> bool:
        """One event more, or the end; whether there is more to do."""
        if self.cancelled:
            self.close()
            return False
        started = time.monotonic()
        try:
            if self._events is None:
                self._events = self._work()
            self.send(next(self._events))
            return True
        except StopIteration:
            self.send(DONE)
        except Exception as error:
            self.send(error)
        finally:
            self.seconds += time.monotonic() - started
        return False

    def close(self) -> None:
        """End the work where it stands."""
        if self._events is not None:
            with suppress(Exception):  # nobody waits for it
                self._events.close()

    def send(self, event: Any) -> None:
        """Hand an event over; it is lost where nobody waits any more."""
        with suppress(RuntimeError):  # the loop is closed
            self._deliver(event)


class Scheduler:
    """Runs jobs on a thread of its own, `running` side by side; `waiting` more may wait."""

    def __init__(
        self,
        running: int,
        waiting: int,
        name: str,
        may_start: Callable[[], bool] = lambda: True,
    ) -> None:
        """`may_start`: whether one more may start beside those that run."""
        self._limit, self._most, self._may_start = running, waiting, may_start
        self._waiting: deque[Job] = deque()
        self._running: deque[Job] = deque()
        self._changed, self._closed, self._finishes = threading.Condition(), False, False
        self._seconds = 1.0  # that a job runs, averaged
        self._step: float | None = None  # when the call began that runs now
        self._thread = threading.Thread(target=self._run, name=f"edgeprune {name}", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs that have not started."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Jobs that have started and go on."""
        return len(self._running)

    @property
    def step_seconds(self) -> float:
        """How long the call that runs now has been running; 0 where none does."""
        started = self._step
        return 0.0 if started is None else time.monotonic() - started

    @contextmanager
    def outside_step(self) -> Iterator[None]:
        """A block of a job that is no call of the engine: it does not count in `step_seconds`."""
        started, self._step = self._step, None
        try:
            yield
        finally:
            if started is not None:
                self._step = time.monotonic()

    @property
    def is_full(self) -> bool:
        """Whether one more job would be refused."""
        return self._closed or len(self._waiting) >= self._most

    def check_room(self) -> None:
        """HttpError with status 429 where the queue is full."""
        if self._closed:
            raise HttpError(503, "the server is stopping; ask again later")
        if self.is_full:
            seconds = math.ceil(self._seconds * (len(self._waiting) + len(self._running)))
            raise HttpError(
                429,
                f"{len(self._waiting)} requests wait already; ask again in {seconds} s",
                code="queue_full",
                headers={"Retry-After": str(seconds)},
            )

    def submit(self, job: Job) -> None:
        """Add a job to the queue; HttpError where it is full."""
        with self._changed:
            self.check_room()
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for a job any more: take it out of the queue, or end it at its turn."""
        with self._changed:
            job.cancelled = True
            with suppress(ValueError):
                self._waiting.remove(job)

    def close(self, *, finish: bool = False) -> None:
        """End the thread: with `finish` once all jobs are done, else after the call that runs, and
        jobs that are left end with an error."""
        with self._changed:
            self._closed, self._finishes = True, finish
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while self._wait():
            job = self._running[0]
            self._step = time.monotonic()
            more = job.advance()
            self._step = None
            self._running.popleft()
            if more:
                self._running.append(job)
            else:
                self._seconds += 0.2 * (job.seconds - self._seconds)
        for job in (*self._running, *self._waiting):
            job.close()
            job.send(HttpError(503, "the server stopped before the answer was complete"))

    def _wait(self) -> bool:
        """Start what may start, as soon as there is a job; False at the end."""
        with self._changed:
            while not (self._waiting or self._running or self._closed):
                self._changed.wait()
            while self._waiting and self._takes_one_more():
                self._running.append(self._waiting.popleft())
            return not self._closed or (self._finishes and bool(self._running))

    def _takes_one_more(self) -> bool:
        if not self._running:
            return True
        return len(self._running) < self._limit and self._may_start()
