"""Load on `edgeprune serve`: clients that ask side by side, each answer beside `Session`'s.

    python -m benchmarks.serve_load BUNDLE --clients 1,4,16 --seconds 30

Each client holds dialogues of two turns about scenes of the demo, half of them as streams, and now
and then leaves in the middle of an answer. Counted are requests, wrong answers, errors, and the
server's resident memory after the warm-up and at the end. It makes no claim about time.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from edgeprune.demo.questions import held_out
from edgeprune.runtime import Session

LEAVES = 0.05
"""Share of requests whose client goes after the first piece."""


@dataclass(frozen=True)
class Talk:
    """A dialogue of two questions, with the answers that a session gives."""

    image: str  # data URI
    prompts: tuple[str, str]
    answers: tuple[str, str]

    def messages(self, turn: int) -> list[dict[str, Any]]:
        """What a client sends at a turn."""
        shown = {"type": "image_url", "image_url": {"url": self.image}}
        first = {"role": "user", "content": [shown, {"type": "text", "text": self.prompts[0]}]}
        said = {"role": "assistant", "content": self.answers[0]}
        return [first, said, {"role": "user", "content": self.prompts[1]}] if turn else [first]


def talks(bundle: Path, count: int) -> list[Talk]:
    """Dialogues about the demo's scenes."""
    found, questions = [], list(held_out(2 * count))
    with Session.open(bundle, threads=1) as session:
        for (image, first), (_, second) in zip(questions[::2], questions[1::2], strict=True):
            file = io.BytesIO()
            image.save(file, "png")
            answers = session.ask(image, first.text).text, session.follow_up(second.text).text
            uri = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
            found.append(Talk(uri, (first.text, second.text), answers))
    return found


class Clients:
    """Threads that ask until the time is up."""

    def __init__(self, url: str, model: str, talks: list[Talk]) -> None:
        self.url, self.model, self.talks = url, model, talks
        self.counts: Counter[str] = Counter()

    def run(self, clients: int, seconds: float) -> Counter[str]:
        """How often what happened."""
        self.counts = Counter()
        end = time.monotonic() + seconds
        threads = [threading.Thread(target=self._client, args=[n, end]) for n in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.counts

    def _client(self, number: int, end: float) -> None:
        draw = random.Random(number)
        with httpx.Client(base_url=self.url, timeout=120) as client:
            while time.monotonic() < end:
                talk = draw.choice(self.talks)
                for turn in (0, 1):
                    self._ask(client, talk, turn, draw)

    def _ask(self, client: httpx.Client, talk: Talk, turn: int, draw: random.Random) -> None:
        stream, leaves = draw.random() < 0.5, draw.random() < LEAVES
        body = {"model": self.model, "messages": talk.messages(turn), "stream": stream or leaves}
        with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            if reply.status_code != 200:
                self.counts[f"status {reply.status_code}"] += 1
                return
            if leaves:
                next(reply.iter_lines())
                self.counts["left"] += 1
                return
            text = reply.read().decode()
        right = said(text, stream) == talk.answers[turn]
        self.counts["right" if right else "wrong"] += 1


def said(text: str, stream: bool) -> str | None:
    """The answer in a reply; None where a stream has no good end."""
    if not stream:
        return str(json.loads(text)["choices"][0]["message"]["content"])
    events = [line[len("data: ") :] for line in text.splitlines() if line]
    if events.pop() != "[DONE]":
        return None
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
    return "".join(delta.get("content", "") for delta in deltas)


@contextmanager
def server(bundle: Path) -> Iterator[str]:
    """A server of the bundle on a free port; its address."""
    command = [sys.executable, "-m", "edgeprune.cli", "serve", str(bundle), "--port", "0"]
    process = subprocess.Popen([*command, "--threads", "1"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        found = re.search(r"on (http://\S+)/v1", line := process.stderr.readline())
        if found is None:
            sys.exit(line + process.stderr.read())
        yield found[1]
        process.terminate()
        print("server:", process.stderr.read().strip(), "code", process.wait(60))
    finally:
        process.kill()


def resident(url: str) -> float:
    """Megabytes that the server has resident."""
    text = httpx.get(f"{url}/metrics").text
    (line,) = re.findall(r"^process_resident_memory_bytes (\S+)", text, re.MULTILINE)
    return float(line) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--clients", default="1,4,16")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--talks", type=int, default=40)
    args = parser.parse_args()
    known = talks(args.bundle, args.talks)
    with server(args.bundle) as url:
        model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        clients = Clients(url, model, known)
        clients.run(4, 5)
        print(f"after the warm-up: {resident(url):.1f} MB")
        for count in map(int, args.clients.split(",")):
            counts = dict(clients.run(count, args.seconds))
            print(f"{count} clients: {counts}, {resident(url):.1f} MB", flush=True)


if __name__ == "__main__":
    main()
