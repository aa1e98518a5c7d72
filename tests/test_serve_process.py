"""The process of a server: how it starts, what it is told, and how it stops."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Refused
from tests.server import LONG, chat, refusal, running, running_now

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
pytest.importorskip("starlette")


def test_a_stop_signal_lets_answers_end(demo_fastv: Path) -> None:
    with running(demo_fastv, "--sequences", 2, "--kept-memory", 0) as server:
        replies: list[Any] = []

        def ask(stream: bool) -> None:
            with httpx.Client(base_url=server.url, timeout=60) as client:
                replies.append(chat(client, stream=stream, max_tokens=150, **LONG))

        threads = [threading.Thread(target=ask, args=[index % 2 == 0]) for index in range(4)]
        for thread in threads:
            thread.start()
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while sum(running_now(client).values()) < 4:
                time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert server.process.wait(30) == 0
        assert server.process.stderr is not None
        assert server.process.stderr.read() == "stopped\n"
        assert [reply.status_code for reply in replies] == [200] * 4
        for reply in replies:
            if reply.headers["content-type"].startswith("text/event-stream"):
                assert reply.text.endswith("data: [DONE]\n\n")
            else:
                assert reply.json()["usage"]["completion_tokens"] == 150


def test_an_answer_has_a_deadline_and_a_local_server_no_name(demo_fastv: Path) -> None:
    with (
        running(demo_fastv, "--timeout", 0.2) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        named = client.get("/v1/models", headers={"Host": "example.org"})
        assert "called by an address or as localhost" in refusal(named, 403)
        assert client.get("/v1/models", headers={"Host": "localhost:80"}).status_code == 200
        told = refusal(chat(client, max_tokens=800, min_tokens=800), 504)
        assert told == "there was no answer within 0.2 s; ask again"
        streamed = chat(client, max_tokens=800, min_tokens=800, stream=True).text
        assert '"code": "timeout"' in streamed and "[DONE]" not in streamed


STARTED = """
import os, signal, sys
from pathlib import Path

import edgeprune.serve.server as server
from edgeprune.cli import main

link, target, *arguments = sys.argv[1:]
opened = server._open

def open_and_hang_up(path, **options):
    bundle = opened(path, **options)
    if Path(link).resolve() != Path(target):
        new = Path(link).with_name("new")
        new.symlink_to(target)
        new.replace(link)
        os.kill(os.getpid(), signal.SIGHUP)
    return bundle

server._open = open_and_hang_up
sys.exit(main(["serve", link, *arguments]))
"""


def test_a_hangup_before_the_server_is_ready(
    demo_fastv: Path, demo_dense: Path, tmp_path: Path
) -> None:
    """It ends nothing; the bundle that was put in place meanwhile is opened once it is ready."""
    link = tmp_path / "served"
    link.symlink_to(demo_fastv)
    arguments = [link, demo_dense.resolve(), "--port", "0", "--threads", "1"]
    command = [sys.executable, "-c", STARTED, *map(str, arguments)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert process.stderr.readline().startswith("serving demo-fastv on ")
            assert "demo-fastv is replaced by demo-none" in process.stderr.readline()
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--sequences", 0], "--sequences is at least 1"),
        (["--kept-memory", -1], "--kept-memory is at least 0"),
        (["--tile-memory", -1], "--tile-memory is at least 0"),
        (["--timeout", 0], "--timeout is a number of seconds above 0; got 0"),
        (["--port", 70000], "--port is from 0"),
        (["--media", "nosuch"], "--media is a folder"),
        (["--host", "203.0.113.1"], "cannot be listened on"),
        (["--api-key", ""], "the API key is empty"),
        (["--port", 0], "no bundle"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    options: list[Any], says: str, refused: Refused, tmp_path: Path
) -> None:
    assert says in refused("serve", tmp_path / "nosuch", *options)


def test_commands_of_the_page_are_read() -> None:
    """Every `edgeprune serve` in docs/serve.md has options that there are."""
    import shlex

    from edgeprune.cli import parser

    page = Path(__file__).resolve().parents[1] / "docs" / "serve.md"
    lines = [
        line.partition("edgeprune serve ")[2].partition("  #")[0]
        for line in page.read_text(encoding="utf-8").splitlines()
        if line.startswith("    ") and "edgeprune serve " in line
    ]
    assert len(lines) >= 2
    for line in lines:
        parser().parse_args(["serve", *shlex.split(line)])


def test_pieces_are_sent_at_once() -> None:
    """Not held back for the acknowledgement of the last one, which takes 40 ms."""
    import asyncio
    import socket

    from edgeprune.serve.server import _listen

    async def waits() -> int:
        told = asyncio.get_running_loop().create_future()

        def accepted(reader: Any, writer: asyncio.StreamWriter) -> None:
            connection = writer.get_extra_info("socket")
            told.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with _listen("127.0.0.1", 0) as listener:
            async with await asyncio.start_server(accepted, sock=listener):
                _, writer = await asyncio.open_connection(*listener.getsockname())
                found = await told
                writer.close()
                return int(found)

    assert asyncio.run(waits()) == 1
