"""What `watch` saves on a clip of a still scene with one change, in questions and in encodings.

Each frame is asked three ways: every frame with the vision graph run anew, every frame with equal
frames encoded once, and only frames that changed. Rounds take turns, so that a busy moment of the
machine falls on all three. `still` is a bundle's, so of several tiles a frame where it takes them.

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

import numpy as np
from PIL import Image

from edgeprune.demo import SAMPLES_DIR
from edgeprune.runtime import Session
from edgeprune.watch.sources import Frame
from edgeprune.watch.watching import Watch, WatchRequest

QUESTION = "what color is the star ?"
WAYS = ("every frame, encoded anew", "every frame, equal ones encoded once", "on change")


@dataclass(frozen=True)
class Clip:
    """A scene, and from `at` on another one."""

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

    def _encoded(self, image: Image.Image):  # type: ignore[no-untyped-def]
        self._pixels = None
        return super()._encoded(image)


def main() -> None:
    parser = argparse.ArgumentParser(description="Questions and encodings that `watch` saves.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--frames", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=8, help="of an answer, at most")
    parser.add_argument("--backend", default="ort-cpu")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    scenes = [Image.open(SAMPLES_DIR / f"scene-{number}.png").convert("RGB") for number in (1, 6)]
    with Session.open(args.bundle, backend=args.backend, threads=args.threads) as session:
        record, tiling = session.manifest.image, session.manifest.image.tiling
        size = (tiling.width, tiling.height) if tiling else (record.width, record.height)
        before, after = (scene.resize(size) for scene in scenes)
        clip = Clip(before, after, args.frames, args.frames // 2)
        plain = WatchRequest(QUESTION, max_new_tokens=args.tokens)
        changed = WatchRequest(QUESTION, max_new_tokens=args.tokens, on_change=0.05)
        ways = ((Forgetful, plain), (Watch, plain), (Watch, changed))
        session.warm_up()
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        answers: dict[str, list[str]] = {}
        for _ in range(args.rounds):
            for way, (watch, request) in zip(WAYS, ways, strict=True):
                started = time.perf_counter()
                records = list(watch(session, request).records(clip))
                seconds[way].append(time.perf_counter() - started)
                answers[way] = [f"{found['frame']}: {found['text']}" for found in records]
    told = {
        way: {
            "asked": len(answers[way]),
            "median_s": median(seconds[way]),
            "of_the_first": median(
                mine / first for mine, first in zip(seconds[way], seconds[WAYS[0]], strict=True)
            ),
        }
        for way in WAYS
    }
    equal = answers[WAYS[0]] == answers[WAYS[1]]
    tiles = record.shape[0]
    print(
        json.dumps({"tiles": tiles, "equal_answers": equal, **told, "seconds": seconds}, indent=1)
    )


if __name__ == "__main__":
    main()
