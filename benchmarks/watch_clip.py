"""What `watch` saves on a clip of a still scene with one change, in questions and in encodings.

Each frame is asked three ways: every tile of every frame encoded anew, tiles whose pixels were seen
before not again, and only frames that changed. Halfway through the clip one part of the scene
changes, as large as a tile, and stays so. Rounds take turns, so that a busy moment of the machine
falls on all three.

    python -m benchmarks.watch_clip out/bundle --frames 20 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from edgeprune.demo import SAMPLES_DIR
from edgeprune.images import read_image
from edgeprune.runtime import Session
from edgeprune.runtime.media import prepare
from edgeprune.watch.sources import Frame
from edgeprune.watch.watching import Watch, WatchRequest

QUESTION = "what color is the star ?"
WAYS = ("every tile encoded anew", "equal tiles encoded once", "on change")


@dataclass(frozen=True)
class Clip:
    """A scene, and from `at` on one in which a part differs."""

    before: Image.Image
    after: Image.Image
    count: int
    at: int
    live: bool = False

    def frames(self) -> Iterator[Frame]:
        for number in range(self.count):
            scene = self.before if number < self.at else self.after
            yield Frame(np.asarray(scene), number, number / 10)


class Forgetful(Watch):
    """Encodes each frame, as if none had been seen."""

    def _record(self, frame: Frame) -> dict[str, Any] | None:
        self._session.engine.forget_tiles()
        return super()._record(frame)


def scenes(session: Session) -> tuple[Image.Image, Image.Image]:
    """Of the bundle's frozen size; in the second the lower right of the first is another one's."""
    record, tiling = session.manifest.image, session.manifest.image.tiling
    size = (tiling.width, tiling.height) if tiling else (record.width, record.height)
    files = (SAMPLES_DIR / f"scene-{number}.png" for number in (1, 6))
    before, other = (Image.open(file).convert("RGB").resize(size) for file in files)
    rows, columns = (tiling.rows, tiling.columns) if tiling else (1, 1)
    # Half a tile from the edges of its neighbours, so that resizing leaves their pixels alone.
    left, top = (round(side * (n - 0.5) / n) for side, n in zip(size, (columns, rows), strict=True))
    after = before.copy()
    after.paste(other.crop((left, top, *size)), (left, top))
    return before, after


def main() -> None:
    parser = argparse.ArgumentParser(description="Questions and encodings that `watch` saves.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--frames", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=8, help="of an answer, at most")
    parser.add_argument("--backend", default="ort-cpu")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    with Session.open(args.bundle, backend=args.backend, threads=args.threads) as session:
        before, after = scenes(session)
        clip = Clip(before, after, args.frames, args.frames // 2)
        plain = WatchRequest(QUESTION, max_new_tokens=args.tokens)
        changed = WatchRequest(QUESTION, max_new_tokens=args.tokens, on_change=0.05)
        ways = ((Forgetful, plain), (Watch, plain), (Watch, changed))
        session.warm_up()
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        records: dict[str, list[dict[str, Any]]] = {}
        for _ in range(args.rounds):
            for way, (watch, request) in zip(WAYS, ways, strict=True):
                session.engine.forget_tiles()
                started = time.perf_counter()
                records[way] = list(watch(session, request).records(clip))
                seconds[way].append(time.perf_counter() - started)
        tiles = session.manifest.encoder.tiles
        pixels = [
            prepare(read_image(np.asarray(s)).image, session.manifest.image).pixels
            for s in (before, after)
        ]
    first = seconds[WAYS[0]]
    told = {
        way: {
            "asked": len(records[way]),
            "tiles_encoded": sum(one["tiles_encoded"] for one in records[way]),
            "median_s": median(seconds[way]),
            "of_the_first": median(a / b for a, b in zip(seconds[way], first, strict=True)),
        }
        for way in WAYS
    }
    answers = [[one["text"] for one in records[way]] for way in WAYS[:2]]
    parts = zip(*(np.split(one, tiles) for one in pixels), strict=True)
    shown = {
        "tiles": tiles,
        "tiles_that_change": sum(not np.array_equal(a, b) for a, b in parts),
        "equal_answers": answers[0] == answers[1],
    }
    print(json.dumps({**shown, **told, "seconds": seconds}, indent=1))


if __name__ == "__main__":
    main()
