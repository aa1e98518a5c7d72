"""What `watch` saves on a clip of a still scene with one change, in questions and in encodings.

Each frame is asked three ways: every tile of every frame encoded anew, tiles whose pixels were seen
before not again, and only frames that changed. Halfway through the clip one part of the scene
changes, as large as a tile, and stays so. Rounds take turns, so that a busy moment of the machine
falls on all three. A model of real size with three tiles, 3 GB of disk:

    python -m benchmarks.published onevision-0.5b out/onevision --random
    edgeprune export --model out/onevision --image-size 768x384 --method fastv --cr 4 --parity 0 \
        -o out/onevision-768
    python -m benchmarks.watch_clip out/onevision-768 --frames 6 --rounds 3
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


@dataclass(frozen=True)
class Clip:
    """A scene, and from the middle on one in which a part differs."""

    before: Image.Image
    after: Image.Image
    count: int
    live: bool = False

    def frames(self) -> Iterator[Frame]:
        for number in range(self.count):
            scene = self.before if number < self.count // 2 else self.after
            yield Frame(np.asarray(scene), number, number / 10)


class Forgetful(Watch):
    """Encodes each frame, as if none had been seen."""

    def _record(self, frame: Frame) -> dict[str, Any] | None:
        self._session.engine.forget_tiles()
        return super()._record(frame)


WAYS: dict[str, tuple[type[Watch], float | None]] = {
    "every tile encoded anew": (Forgetful, None),
    "equal tiles encoded once": (Watch, None),
    "on change": (Watch, 0.05),
}
"""How a clip is watched, and the least change of a frame that is asked."""


def measure(session: Session, frames: int, rounds: int, tokens: int) -> dict[str, Any]:
    """What each way asks, encodes and takes; answers have `tokens` tokens at most."""
    before, after = scenes(session)
    clip = Clip(before, after, frames)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    records: dict[str, list[dict[str, Any]]] = {}
    for _ in range(rounds):
        for way, (watch, least) in WAYS.items():
            request = WatchRequest(QUESTION, max_new_tokens=tokens, on_change=least)
            session.engine.forget_tiles()
            started = time.perf_counter()
            records[way] = list(watch(session, request).records(clip))
            seconds[way].append(time.perf_counter() - started)
    anew, once, changed = ([r["text"] for r in found] for found in records.values())
    asked = [record["frame"] for record in records["on change"]]
    first = seconds[next(iter(WAYS))]
    return {
        "tiles": session.manifest.encoder.tiles,
        "tiles_that_change": _differing(session, before, after),
        "equal_answers": once == anew and changed == [anew[frame] for frame in asked],
        **{way: _told(records[way], seconds[way], first) for way in WAYS},
        "seconds": seconds,
    }


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


def _differing(session: Session, *images: Image.Image) -> int:
    """How many tiles of two images have other pixels."""
    record = session.manifest.image
    one, other = (prepare(read_image(np.asarray(image)).image, record).pixels for image in images)
    tiles = session.manifest.encoder.tiles
    pairs = zip(np.split(one, tiles), np.split(other, tiles), strict=True)
    return sum(not np.array_equal(a, b) for a, b in pairs)


def _told(
    records: list[dict[str, Any]], seconds: list[float], first: list[float]
) -> dict[str, float]:
    return {
        "asked": len(records),
        "tiles_encoded": sum(record["tiles_encoded"] for record in records),
        "median_s": median(seconds),
        "of_the_first": median(a / b for a, b in zip(seconds, first, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Questions and encodings that `watch` saves.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--frames", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=8, help="of an answer, at most")
    parser.add_argument("--backend", default="ort-cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="write every round here")
    args = parser.parse_args()
    with Session.open(args.bundle, backend=args.backend, threads=args.threads) as session:
        session.warm_up()
        found = measure(session, args.frames, args.rounds, args.tokens)
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
