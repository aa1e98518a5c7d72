"""Requests to the server whose bodies are altered by type, and names of models that are none."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import quote

from tests.fuzz.case import Case
from tests.fuzz.mutate import STRINGS, alter, damage, parses
from tests.fuzz.seeds import QUESTION, Seeds

WEIGHT = 8

NAMES = ("dial", "dial@1.5", "dial@1.2")
STRANGE = (
    *("dial@", "@", "dial@2", "dial@1.50", "dial@nan", "dial@-1", "dial@1.5@1.2", "DIAL@1.5"),
    *("dial @1.5", "dial@1e0", "dial/../dial", *STRINGS),
)
FIELDS: tuple[dict[str, Any], ...] = (
    {"stream": True, "stream_options": {"include_usage": True}},
    {"temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["x", "red"]},
    {"logprobs": True, "top_logprobs": 2, "details": True},
    {"regex": "[a-z]{1,3}( [0-9]+)*"},
    {"response_format": {"type": "text"}},
    {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1, "no_repeat_ngram_size": 2, "n": 1},
)


def make(rng: Random, seeds: Seeds, folder: Path) -> Case:
    app = _app(seeds.dial)  # slow the first time
    if rng.random() < 0.15:
        name = rng.choice(STRANGE)
        path = f"/v1/models/{quote(name, safe='', errors='replace')}"
        return Case(_asked(app, "GET", path), f"the model {name[:40]!r}", True)
    body = _body(rng, seeds)
    if rng.random() < 0.1:
        content, note = damage(json.dumps(body).encode(), rng)
    else:
        text, note = alter(body, rng)
        content = text.encode()
    return Case(_asked(app, "POST", "/v1/chat/completions", content), note, parses(content))


def _body(rng: Random, seeds: Seeds) -> dict[str, Any]:
    uri = "data:image/png;base64," + base64.b64encode(seeds.image.read_bytes()).decode()
    shown = {"type": "image_url", "image_url": {"url": uri}}
    messages = [{"role": "user", "content": [shown, {"type": "text", "text": QUESTION}]}]
    if rng.random() < 0.3:
        messages += [
            {"role": "assistant", "content": "red"},
            {"role": "user", "content": "and now ?"},
        ]
    if rng.random() < 0.15:
        own: dict[str, Any] = {"choices": ["red", "blue", "5"]}
    else:
        own = {"max_tokens": 3}
        for fields in rng.sample(FIELDS, rng.choice([0, 1, 2])):
            own |= fields
    name = rng.choice(NAMES) if rng.random() < 0.8 else rng.choice(STRANGE)
    return {"model": name, "messages": messages, **own}


@cache
def _app(bundle: Path) -> Any:
    """What `serve` answers with, without its socket."""
    from edgeprune.runtime import Engine
    from edgeprune.serve.app import Service
    from edgeprune.serve.model import ServedBundle
    from edgeprune.serve.server import ServeRequest

    served = ServedBundle(partial(Engine.open, bundle, threads=1), sequences=2, queue=4)
    return Service({served.name: served}, ServeRequest((bundle,)).limits("127.0.0.1")).app()


def _asked(app: Any, method: str, path: str, content: bytes = b"") -> Callable[[], int]:
    """One request; of an error the message stands on stderr, as that of a command."""

    def run() -> int:
        status, message = asyncio.run(_answered(app, method, path, content))
        if status >= 500:
            raise RuntimeError(f"status {status}: {message}")
        if status == 200:
            return 0
        sys.stderr.write(f"edgeprune: {message}\n")
        return 2

    return run


async def _answered(app: Any, method: str, path: str, content: bytes) -> tuple[int, str]:
    """The status of an answer, that of an error within a stream too, and the error's message."""
    import httpx

    address, kind = "http://127.0.0.1", {"content-type": "application/json"}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=address) as client:
        reply = await client.request(method, path, content=content, headers=kind, timeout=None)
    if reply.headers["content-type"] == "application/json":
        return reply.status_code, str(reply.json().get("error", {}).get("message"))
    *_, last = (line for line in reply.text.splitlines() if line.startswith("data: "))
    if last == "data: [DONE]":
        return reply.status_code, ""
    error = json.loads(last.removeprefix("data: "))["error"]
    return 500 if error["type"] == "server_error" else 400, str(error["message"])
