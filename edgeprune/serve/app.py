"""The routes: what a server answers to each address."""

from __future__ import annotations

import asyncio
import json
import time
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from edgeprune import terminal
from edgeprune.serve.admission import Admission, Limits
from edgeprune.serve.errors import HttpError, http_error
from edgeprune.serve.exchange import GONE, answer
from edgeprune.serve.metrics import Metrics
from edgeprune.serve.model import Event, Finished, Piece, ServedBundle
from edgeprune.serve.page import page_file
from edgeprune.serve.replies import ChatReply, model_record
from edgeprune.serve.request import ChatRequest, parse

Handler = Callable[[Request], Awaitable[Any]]


class Service:
    """Answers requests with the bundles that are open."""

    def __init__(self, bundles: Mapping[str, ServedBundle], limits: Limits) -> None:
        self.bundles, self.limits, self.metrics = bundles, limits, Metrics()
        self._admission = Admission(limits)

    def app(self) -> Starlette:
        """All routes. Every error is JSON; a server's own error is told without its inside."""
        return Starlette(
            routes=[
                Route("/", self._guarded(self._page, key=False)),
                Route("/page/{name}", self._guarded(self._page, key=False)),
                Route("/health", self._guarded(self._health, key=False)),
                Route("/metrics", self._guarded(self._metrics)),
                Route("/v1/models", self._guarded(self._models)),
                Route("/v1/models/{model:path}", self._guarded(self._model)),
                Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
            ],
            exception_handlers={HTTPException: _no_route},
        )

    def _guarded(self, handler: Handler, *, key: bool = True) -> Handler:
        """The handler behind the key, with its errors as answers."""

        async def guarded(request: Request) -> Any:
            try:
                if key:
                    self._admission.check(request)
                return await handler(request)
            except (GONE, ClientDisconnect):
                return Response(status_code=499)  # nobody reads it
            except Exception as error:
                return _error(error)

        return guarded

    async def _page(self, request: Request) -> Response:
        """Anybody may see the page, which asks for the key; it shows nothing by itself."""
        self._admission.check_name(request)
        return await page_file(request)

    async def _health(self, request: Request) -> Response:
        failed = {bundle.name: bundle.failure for bundle in self.bundles.values() if bundle.failure}
        if failed:
            return _json({"status": "failed", "models": failed}, 503)
        return _json({"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(self.bundles), media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        records = [
            model_record(bundle, name, cr)
            for bundle in self.bundles.values()
            for name, cr in bundle.models().items()
        ]
        return _json({"object": "list", "data": records})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["model"]
        return _json(model_record(*self._bundle(name)))

    async def _chat(self, request: Request) -> Any:
        """A chat completion; the metrics learn how it ended."""
        arrived, name = time.monotonic(), ""
        try:
            self._check_room()
            async with self._admission.body(request) as body:
                limits = self.limits
                chat = await asyncio.to_thread(parse, body, limits.images)
                bundle, model, cr = self._bundle(chat.model)
                chat = replace(chat, conversation=replace(chat.conversation, cr=cr))
                name = bundle.name
                events = answer(bundle, chat, request.receive, limits.seconds)
                events = self._measured(events, name, arrived)
                first = await anext(events)  # until here an error of a stream has a status
                if chat.stream:
                    self.metrics.request(name, 200)
                    return EventStream(_chunks(first, events, ChatReply(model), chat))
                finished = await _last(first, events)
        except (GONE, ClientDisconnect):
            self.metrics.client_left(name)
            raise
        except Exception as error:
            self.metrics.request(name, http_error(error).status)
            raise
        self.metrics.request(name, 200)
        return _json(ChatReply(model).whole(finished))

    def _check_room(self) -> None:
        """HttpError where no bundle has room for one more, before megabytes are read."""
        schedulers = [bundle.scheduler for bundle in self.bundles.values()]
        if all(scheduler.is_full for scheduler in schedulers):
            schedulers[0].check_room()

    def _bundle(self, name: str) -> tuple[ServedBundle, str, float | None]:
        """The bundle that a model is, the model's name, and the ratio that it asks for."""
        models: dict[str, tuple[ServedBundle, str, float | None]]
        models = {own: (bundle, own, None) for own, bundle in self.bundles.items()}
        for bundle in self.bundles.values():
            for model, cr in bundle.models().items():
                models.setdefault(model, (bundle, model, cr))
        if name not in models:
            raise HttpError(
                404,
                f"there is no model {name[:80]!r}; choose one of: {', '.join(models)}",
                "model",
                "model_not_found",
            )
        return models[name]

    async def _measured(
        self, events: AsyncGenerator[Event, None], name: str, arrived: float
    ) -> AsyncGenerator[Event, None]:
        """The same events; the metrics learn when they came."""
        first = None
        async with aclosing(events):
            async for event in events:
                now = time.monotonic() - arrived
                first = now if first is None else first
                if isinstance(event, Finished):
                    self.metrics.answer(name, event, first, now)
                yield event


class EventStream:
    """A response of server-sent events, each a JSON object; [DONE] ends those that ended well."""

    def __init__(self, records: AsyncGenerator[dict[str, Any] | None, None]) -> None:
        self._records = records

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
        ]
        async with aclosing(self._records):
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for record in self._records:
                data = b"[DONE]" if record is None else _bytes(record)
                body = b"data: " + data + b"\n\n"
                await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _last(event: Event, events: AsyncGenerator[Event, None]) -> Finished:
    async with aclosing(events):
        while isinstance(event, Piece):
            event = await anext(events)
    return event


async def _chunks(
    first: Event,
    events: AsyncGenerator[Event, None],
    reply: ChatReply,
    chat: ChatRequest,
) -> AsyncGenerator[dict[str, Any] | None, None]:
    """The objects of a stream, None at a good end; an error is the last one."""
    yield reply.first_chunk()
    try:
        async with aclosing(events):
            event: Event = first
            while isinstance(event, Piece):
                if event.text or event.scores:
                    yield reply.chunk(event)
                event = await anext(events)
    except GONE:
        return
    except Exception as error:
        _log(error)
        yield http_error(error).body()
        return
    yield reply.last_chunk(event)
    if chat.stream_usage:
        yield reply.usage_chunk(event)
    yield None


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = f"there is no {request.method} {request.url.path[:80]}; see docs/serve.md"
    return _response(HttpError(error.status_code, told))


def _error(error: Exception) -> Response:
    _log(error)
    return _response(http_error(error))


def _response(error: HttpError) -> Response:
    return _json(error.body(), error.status, error.headers)


def _json(
    record: dict[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(_bytes(record), status, headers, "application/json")


def _bytes(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode()  # ASCII, whatever the text holds


def _log(error: Exception) -> None:
    """A line about an error of the server's own: what and where, no text of a request."""
    if http_error(error).status < 500:
        return
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    terminal.note(f"edgeprune: {type(error).__name__}{place}")
