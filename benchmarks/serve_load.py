"""Load on `edgeprune serve`: clients that ask side by side, each answer beside `Session`'s.

    python -m benchmarks.serve_load BUNDLE --clients 1,4,16,64 --seconds 120 --requests 10000

Each client holds dialogues of two turns about scenes of the demo, half of them as streams, and now
and then leaves in the middle of an answer. Counted are requests, wrong answers, errors, times to
the first piece, requests a second, the share of the client that was served least, and the server's
resident memory: after the warm-up, after each number of clients, and after `--requests` more. A
server with a short queue then tells what an overload gets. On a machine that does something else
times mean nothing.
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
        self.first: list[float] = []  # milliseconds to the first piece of streams
        self.served: Counter[int] = Counter()  # by client
        self.left = 0  # requests

    def run(self, clients: int, seconds: float, requests: int = 1 << 60) -> dict[str, Any]:
        """How often what happened, until the time is up or so many were asked."""
        self.counts, self.first, self.served, self.left = Counter(), [], Counter(), requests
        started = time.monotonic()
        end = started + seconds
        threads = [threading.Thread(target=self._client, args=[n, end]) for n in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        spent, total = time.monotonic() - started, sum(self.served.values())
        least = min((self.served[number] for number in range(clients)), default=0)
        return {
            "clients": clients,
            **self.counts,
            "requests_per_s": round(total / spent, 2),
            "least_served": round(clients * least / max(1, total), 2),  # 1: all alike
            "ttft_ms": {name: round(value, 1) for name, value in percentiles(self.first).items()},
        }

    def _client(self, number: int, end: float) -> None:
        draw = random.Random(number)
        with httpx.Client(base_url=self.url, timeout=120) as client:
            while time.monotonic() < end and self.left > 0:
                talk = draw.choice(self.talks)
                for turn in (0, 1):
                    self.left -= 1
                    self._ask(client, talk, turn, draw)
                    self.served[number] += 1

    def _ask(self, client: httpx.Client, talk: Talk, turn: int, draw: random.Random) -> None:
        stream, leaves = draw.random() < 0.5, draw.random() < LEAVES
        body = {"model": self.model, "messages": talk.messages(turn), "stream": stream or leaves}
        started = time.monotonic()
        with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            if reply.status_code != 200:
                self.counts[f"status {reply.status_code}"] += 1
                return
            if leaves:
                next(reply.iter_lines())
                self.counts["left"] += 1
                return
            lines = reply.iter_lines()
            text = next(lines) + "\n"
            if stream:  # the head comes with the first token
                self.first.append(1e3 * (time.monotonic() - started))
            text += "\n".join(lines)
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


def percentiles(values: list[float]) -> dict[str, float]:
    """The middle, and what one in a hundred passes."""
    ordered = sorted(values)
    return {f"p{p}": ordered[(len(ordered) * p) // 100] for p in (50, 99)} if ordered else {}


@contextmanager
def server(bundle: Path, *options: str) -> Iterator[str]:
    """A server of the bundle on a free port; its address."""
    command = [sys.executable, "-m", "edgeprune.cli", "serve", str(bundle), "--port", "0"]
    command += ["--threads", "1", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
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
    parser.add_argument("--requests", type=int, default=0, help="at the end, for memory")
    args = parser.parse_args()
    known = talks(args.bundle, args.talks)
    with server(args.bundle) as url:
        model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        clients = Clients(url, model, known)
        clients.run(4, 5)
        print(f"after the warm-up: {resident(url):.1f} MB", flush=True)
        for count in map(int, args.clients.split(",")):
            record = clients.run(count, args.seconds)
            print(json.dumps({**record, "resident_mb": round(resident(url), 1)}), flush=True)
        if args.requests:
            before = resident(url)
            record = clients.run(4, 1e9, args.requests)
            after = resident(url)
            told = {"resident_mb": [round(before, 1), round(after, 1)], "grew": after / before - 1}
            print(json.dumps({**record, **told}), flush=True)
    with server(args.bundle, "--sequences", "1", "--queue", "2") as url:
        print("queue of 2:", json.dumps(Clients(url, model, known).run(16, 5)))


if __name__ == "__main__":
    main()
