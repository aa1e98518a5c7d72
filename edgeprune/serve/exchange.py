"""Between the event loop and the thread that answers: one request, and who waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from typing import Any

from edgeprune.serve.errors import HttpError
from edgeprune.serve.model import Event, ServedBundle
from edgeprune.serve.request import ChatRequest
from edgeprune.serve.scheduler import DONE, Job

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


GONE = ConnectionAbortedError
"""Raised where the client went away, so that nobody reads an answer."""


async def answer(
    bundle: ServedBundle, request: ChatRequest, receive: Receive, seconds: float
) -> AsyncGenerator[Event, None]:
    """The pieces of an answer as they come, then what it was.

    Ends with an HttpError where the queue is full or `seconds` have passed, with GONE where
    the client goes; whatever ends it, the work on it ends too.
    """
    loop, events = asyncio.get_running_loop(), asyncio.Queue[Any]()

    def deliver(event: Any) -> None:
        loop.call_soon_threadsafe(events.put_nowait, event)

    job = Job(lambda: bundle.answer(request), deliver)
    bundle.scheduler.submit(job)
    late = HttpError(504, f"there was no answer within {seconds:g} s; ask again", code="timeout")
    timer = loop.call_later(seconds, events.put_nowait, late)
    watch = loop.create_task(_watch(receive, events))
    try:
        while (event := await events.get()) is not DONE:
            if isinstance(event, Exception):
                raise event
            yield event
    finally:
        timer.cancel()
        watch.cancel()
        bundle.scheduler.cancel(job)


async def _watch(receive: Receive, events: asyncio.Queue[Any]) -> None:
    """Tell when the client goes; the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
    events.put_nowait(GONE("the client went away"))
