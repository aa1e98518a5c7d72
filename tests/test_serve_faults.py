"""What a server does with clients that leave, lie, hurry or try doors, and when it has to stop."""

from __future__ import annotations

import asyncio
import json
import socket
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.server import (
    LONG,
    MODEL,
    NEXT,
    QUESTION,
    SCENE,
    Server,
    asked,
    chat,
    data_uri,
    folder_of,
    refusal,
    running,
    running_now,
)

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

KEY = "a key"
HEADERS = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def server(demo_fastv: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    media = folder_of(SCENE, tmp_path_factory.mktemp("media") / "open")
    options = ["--sequences", 1, "--queue", 2, "--max-body", 1, "--media", media]
    options += ["--api-key", KEY, "--receive", 1]
    with running(demo_fastv, *options) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with httpx.Client(base_url=server.url, headers=HEADERS, timeout=60) as client:
        yield client


def is_well(client: Any) -> None:
    found = chat(client)
    assert found.status_code == 200, found.text
    assert found.json()["choices"][0]["message"]["content"] == "5"


def image_of(url: str) -> list[dict[str, Any]]:
    messages = asked(QUESTION)
    messages[0]["content"][0]["image_url"]["url"] = url
    return messages


def bomb() -> bytes:
    """A PNG of a few kilobytes that says it has 20,000 x 20,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return len(data).to_bytes(4, "big") + kind + data + check.to_bytes(4, "big")

    size = (20_000).to_bytes(4, "big")
    head = chunk(b"IHDR", size + size + bytes([8, 2, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(10_000)))


@pytest.mark.parametrize(
    ("body", "kind", "status", "says"),
    [
        (b"{", "application/json", 400, "the body is no JSON"),
        (b"[1]", "application/json", 400, "a JSON object"),
        (b'{"model": NaN}', "application/json", 400, "NaN is no number"),
        (b"[" * 100_000, "application/json", 400, "too deep"),
        (b"\xff\xfe\xff", "application/json", 400, "the body is no JSON"),
        (b"{}", "text/plain", 415, "application/json"),
        (b"{}", "application/json", 400, "model is the name of a bundle"),
        (b'{"model": "demo-fastv"}', "application/json", 400, "messages is a list"),
    ],
)
def test_a_body_that_is_no_request(
    client: Any, body: bytes, kind: str, status: int, says: str
) -> None:
    found = client.post("/v1/chat/completions", content=body, headers={"content-type": kind})
    assert says in refusal(found, status)


MESSAGES: list[tuple[Any, str]] = [
    ([], "messages is a list"),
    (["hello"], "a message is an object"),
    ([{"role": "user", "content": QUESTION}], "shows no image"),
    ([{"role": "tool", "content": "x"}], "a role is system, user or assistant"),
    ([{"role": "user", "content": 5}], "content is a text"),
    ([{"role": "user", "content": [{"type": "audio"}]}], "a part is"),
    ([*asked(QUESTION), *asked(NEXT)], "take turns"),
    ([*asked(QUESTION), {"role": "assistant", "content": "5"}], "take turns"),
    (
        [*asked(QUESTION), {"role": "assistant", "content": "5"}, *asked(NEXT)],
        "only the first user message shows images",
    ),
    ([{"role": "user", "content": asked("")[0]["content"] * 2}], "no text between"),
    (asked(""), "the prompt is empty"),
    (asked("\ud800"), "is no valid text"),
    (asked("a " * 2000), "positions"),
    (asked("a" * (1 << 19) + "b" * (1 << 19) + "c"), "body"),
    (image_of("data:image/png;base64,%%%"), "no base64"),
    (image_of("data:image/png,raw"), "data URI"),
    (image_of("https://example.org/cat.png"), "fetches no images"),
    (image_of("ftp://example.org/cat.png"), "data:image/png;base64"),
    (image_of(data_uri(b"no image")), "not an image"),
    (image_of(data_uri(b"")), "empty"),
    (image_of(data_uri(bomb())), "400,000,000"),
    (image_of(data_uri(SCENE[:500])), "damaged"),
]


@pytest.mark.parametrize(("messages", "says"), MESSAGES, ids=[says for _, says in MESSAGES])
def test_messages_that_cannot_be_answered(client: Any, messages: Any, says: str) -> None:
    body = json.dumps({"model": MODEL, "messages": messages})
    kind = {"content-type": "application/json"}
    found = client.post("/v1/chat/completions", content=body, headers=kind)
    if says == "body":
        assert "a request may have 1048576 bytes" in refusal(found, 413)
    else:
        assert says in refusal(found, 400)


def test_a_file_is_read_below_the_media_folder_alone(client: Any, tmp_path: Path) -> None:
    assert chat(client, image_of("file:scene.png")).status_code == 200
    for name in ("link.png", "out/secret.png", "nosuch.png", ".", "out"):
        refusal(chat(client, image_of(f"file:{name}")), 404 if name != "." else 400)
    for name in ("../secret.png", "%2e%2e/secret.png", "///etc/passwd", "/etc/passwd", "a\0b", ""):
        assert "below the media folder" in refusal(chat(client, image_of(f"file:{name}")), 400)


def test_a_key_is_asked_for_everywhere_but_for_health(server: Server) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as stranger:
        assert stranger.get("/health").status_code == 200
        for path in ("/v1/models", "/metrics"):
            assert "API key" in refusal(stranger.get(path), 401)
        assert "API key" in refusal(chat(stranger), 401)
        wrong = {"Authorization": "Bearer a kex"}
        refusal(stranger.get("/v1/models", headers=wrong), 401)


def test_other_addresses_are_errors_of_the_same_shape(client: Any) -> None:
    assert "there is no GET /nosuch" in refusal(client.get("/nosuch"), 404)
    assert "there is no GET /v1/chat" in refusal(client.get("/v1/chat/completions"), 405)


def test_fifty_megabytes_are_refused_before_they_are_read(server: Server, client: Any) -> None:
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection(server.address, timeout=30) as link:
        key = f"Authorization: Bearer {KEY}\r\n"
        link.sendall((head + key + f"Content-Length: {50 << 20}\r\n\r\n").encode())
        assert link.recv(12) == b"HTTP/1.1 413"

    def parts() -> Iterator[bytes]:  # no length is told
        for _ in range(50):
            yield b" " * (1 << 20)

    kind = {"content-type": "application/json"}
    try:
        found = client.post("/v1/chat/completions", content=parts(), headers=kind)
        assert found.status_code == 413
    except httpx.WriteError:
        pass  # refused before it was sent
    is_well(client)


def test_half_a_request_leaves_nothing_behind(server: Server, client: Any) -> None:
    for text in (b"POST /v1/chat", b"\x16\x03\x01\x02\x00", b"GET / HTTP/9.9\r\n\r\n"):
        with socket.create_connection(server.address) as link:
            link.sendall(text)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection(server.address) as link:
        link.sendall(head + b"Content-Length: 100\r\n\r\n{")
    is_well(client)


def test_a_request_that_does_not_come_is_not_waited_for(server: Server, client: Any) -> None:
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Authorization: Bearer {KEY}\r\n"
    with (
        socket.create_connection(server.address, timeout=10) as no_head,
        socket.create_connection(server.address, timeout=10) as no_body,
    ):
        no_head.sendall(head.encode())
        no_body.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        assert no_body.recv(12) == b"HTTP/1.1 408"
        assert no_head.recv(1) == b""
    is_well(client)


def test_bodies_share_a_bound() -> None:
    from starlette.requests import Request

    from edgeprune.serve.admission import Admission, Limits
    from edgeprune.serve.errors import HttpError
    from edgeprune.serve.images import ImageDoors

    admission = Admission(Limits(None, True, ImageDoors(100), 100, 60.0, 60.0))

    def request(size: int) -> Request:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": bytes(size)}

        headers = [(b"content-type", b"application/json")]
        return Request({"type": "http", "headers": headers}, receive)

    async def hold() -> None:
        async with AsyncExitStack() as stack:
            for _ in range(4):
                body = await stack.enter_async_context(admission.body(request(90)))
                assert len(body) == 90
            with pytest.raises(HttpError, match="ask again in a second") as caught:
                await stack.enter_async_context(admission.body(request(90)))
            assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "1"})
            await stack.enter_async_context(admission.body(request(40)))
        for size, status in ((90, None), (101, 413), (90, None)):
            with nullcontext() if status is None else pytest.raises(HttpError, match="may have"):
                async with admission.body(request(size)):
                    pass

    asyncio.run(hold())


def test_a_client_that_leaves_makes_room_at_once(server: Server, client: Any) -> None:
    fields = {"stream": True, "max_tokens": 700, "min_tokens": 700}
    body = {"model": MODEL, "messages": asked(QUESTION), **fields}
    with client.stream("POST", "/v1/chat/completions", json=body) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("data: ")
    deadline = time.monotonic() + 10
    while any(running_now(client).values()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(running_now(client).values())
    is_well(client)


def test_an_overload_is_told_with_a_time_to_wait(client: Any) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: chat(client, max_tokens=150, **LONG), range(8)))
    statuses = [response.status_code for response in found]
    assert set(statuses) == {200, 429}, statuses
    assert statuses.count(200) >= 3  # one that is answered, two that wait
    for response in found:
        if response.status_code == 429:
            assert "requests wait already" in refusal(response, 429)
            assert int(response.headers["retry-after"]) >= 1
    texts = {r.json()["choices"][0]["message"]["content"] for r in found if r.status_code == 200}
    assert len(texts) == 1
    is_well(client)
