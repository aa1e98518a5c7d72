"""What the server adds to `Session`: to the first token, to each next one, in time and CPU.

The same first questions go to a session in this process and, as streams, to a server, in turn; so a
busy moment falls on both. Each question is about an image of its own, so that nothing is reused.

    python -m benchmarks.serve_overhead out/bundle --questions 50 --tokens 32
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
from PIL import Image

from benchmarks.serve_load import server
from edgeprune.runtime import Sampling, Session

QUESTION = "what color is the star ?"


def scenes(size: tuple[int, int], count: int) -> list[bytes]:
    """Images of noise, none like another, as PNG."""
    rng, found = np.random.default_rng(0), []
    for _ in range(count):
        levels = rng.integers(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(levels).resize(size, Image.Resampling.BICUBIC).save(file, "PNG")
        found.append(file.getvalue())
    return found


def by_session(session: Session, image: bytes, tokens: int) -> tuple[float, float, float]:
    """Milliseconds to the first piece, per token after it, and of CPU."""
    sampling = Sampling(max_new_tokens=tokens, min_new_tokens=tokens)
    cpu, started = time.process_time(), time.perf_counter()
    pieces = session.stream(image, QUESTION, sampling)
    next(pieces)
    first = time.perf_counter()
    for _ in pieces:
        pass
    each = (time.perf_counter() - first) / (tokens - 1)
    return 1e3 * (first - started), 1e3 * each, 1e3 * (time.process_time() - cpu)


def by_server(client: httpx.Client, model: str, image: bytes, tokens: int) -> tuple[float, float]:
    """Milliseconds to the first piece, and per token after it."""
    uri = "data:image/png;base64," + base64.b64encode(image).decode()
    shown = {"type": "image_url", "image_url": {"url": uri}}
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": [shown, {"type": "text", "text": QUESTION}]}],
        "max_tokens": tokens,
        "min_tokens": tokens,
        "stream": True,
    }
    first = None
    started = time.perf_counter()
    with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        for line in reply.iter_lines():
            if first is None and '"content": "' in line and '"content": ""' not in line:
                first = time.perf_counter()
    assert first is not None
    return 1e3 * (first - started), 1e3 * (time.perf_counter() - first) / (tokens - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description="What the server adds to a session.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=32)
    args = parser.parse_args()
    times: dict[str, list[float]] = {}
    with Session.open(args.bundle, threads=1) as session, server(args.bundle) as url:
        record = session.manifest.image
        images = scenes((record.width, record.height), args.questions + 1)
        with httpx.Client(base_url=url, timeout=600) as client:
            model = client.get("/v1/models").json()["data"][0]["id"]
            for number, image in enumerate(images):
                own = by_session(session, image, args.tokens)
                served = by_server(client, model, image, args.tokens)
                if number:  # the first warms up
                    for name, value in (
                        ("session_first", own[0]),
                        ("session_token", own[1]),
                        ("session_cpu", own[2]),
                        ("server_first", served[0]),
                        ("server_token", served[1]),
                    ):
                        times.setdefault(name, []).append(value)
    told = {name: round(median(values), 3) for name, values in times.items()}
    for what in ("first", "token"):
        pairs = zip(times[f"server_{what}"], times[f"session_{what}"], strict=True)
        told[f"overhead_{what}"] = round(median(ours / theirs for ours, theirs in pairs) - 1, 4)
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
