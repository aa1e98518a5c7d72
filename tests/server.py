"""A server of the real command, in a process of its own; and what a client sends it."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.demo import SAMPLES_DIR

SCENE = (SAMPLES_DIR / "scene-1.png").read_bytes()
OTHER = (SAMPLES_DIR / "scene-6.png").read_bytes()
QUESTION = "what digit is on the purple card ?"
MODEL = "demo-fastv"
NEXT = "how many circles are there ?"

LONG = {"min_tokens": 150}
"""A field that makes the demo, whose answers are a word, speak for 150 tokens."""


@dataclass(frozen=True)
class Server:
    """One that runs; `host:port` and its process."""

    address: tuple[str, int]
    process: subprocess.Popen[str]

    @property
    def url(self) -> str:
        return "http://{}:{}".format(*self.address)


@contextmanager
def running(*arguments: object) -> Iterator[Server]:
    """`edgeprune serve` with these arguments on a free port, until the block ends."""
    command = [sys.executable, "-m", "edgeprune.cli", "serve", "--port", "0", "--threads", "1"]
    process = subprocess.Popen(
        [*command, *map(str, arguments)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stderr is not None and process.stdout is not None
    try:
        line = process.stderr.readline()
        found = re.search(r"on http://([\d.]+):(\d+)/v1", line)
        assert found is not None, line + process.stderr.read()
        yield Server((found[1], int(found[2])), process)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
        process.stdout.close()


def data_uri(image: bytes = SCENE) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


def asked(prompt: str, image: bytes = SCENE) -> list[dict[str, Any]]:
    """The messages of a first question."""
    shown = {"type": "image_url", "image_url": {"url": data_uri(image)}}
    return [{"role": "user", "content": [shown, {"type": "text", "text": prompt}]}]


def went_on(messages: list[dict[str, Any]], answer: str, prompt: str) -> list[dict[str, Any]]:
    """The messages of the next question."""
    said = {"role": "assistant", "content": answer}
    return [*messages, said, {"role": "user", "content": prompt}]


def folder_of(image: bytes, path: Path) -> Path:
    """A folder with an image, for --media, and a file beside it."""
    path.mkdir()
    (path / "scene.png").write_bytes(image)
    (path.parent / "secret.png").write_bytes(image)
    (path / "link.png").symlink_to(path.parent / "secret.png")
    (path / "out").symlink_to(path.parent)
    return path


def chat(client: Any, messages: Any = None, **fields: Any) -> Any:
    body = {"model": MODEL, "messages": messages or asked(QUESTION), **fields}
    return client.post("/v1/chat/completions", json=body)


def refusal(response: Any, status: int) -> str:
    """The one line of an error in OpenAI's shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"]
    assert "Traceback" not in response.text
    return str(error["message"])


def running_now(client: Any) -> dict[str, float]:
    """The gauges of what is being done."""
    lines = client.get("/metrics").text.splitlines()
    found = (
        line.rsplit(" ", 1) for line in lines if line.startswith(("edgeprune_run", "edgeprune_q"))
    )
    return {name.partition("{")[0]: float(value) for name, value in found}
