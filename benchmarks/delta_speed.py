"""How long frames of a fixed camera take, encoded as a whole and patch by patch (`--delta`).

    python -m benchmarks.delta_speed demo --threads 1 --rounds 60
    python -m benchmarks.delta_speed 12x1024-clip --threads 2 --rounds 20 \
        --json benchmarks/results/delta-speed-12x1024-clip.json

Every frame differs from the last one in a square of patches that all of the bundles can take. It is
encoded as a whole by a bundle that was exported without --delta, as a whole by one that has it (its
graph gives keys and values too), and patch by patch with two K. Then the first token of an answer
follows. Frames take turns, and the order of the ways changes, so that a busy moment of the machine
falls on all. Shares are of the same frame as a whole; beside them stands the share of operations.

Shapes have random weights, and take 6 GB of disk and 10 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.shapes import SHAPES, write
from edgeprune.demo import SAMPLES_DIR
from edgeprune.files import write_whole
from edgeprune.making import make
from edgeprune.recipe import Recipe
from edgeprune.runtime import Sampling, Session
from edgeprune.runtime.backend import EncodedImage
from edgeprune.runtime.frames import DeltaOptions
from edgeprune.runtime.media import prepare
from edgeprune.spec import PruneSpec
from edgeprune.tables import plain

DEMO = "demo"
SHARES = (0.25, 0.125)
QUESTION = "what color is the star ?"
METHOD = PruneSpec("fastv", 4)
"""It needs no calibration, which random weights would not bear."""
WARM = 3
"""Rounds that are not counted."""

Pixels = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Way:
    """One way to encode frames, by one bundle."""

    name: str
    session: Session
    encode: Callable[[Pixels], EncodedImage]
    operations: float  # of the encoder, as a share of a whole frame


@dataclass(frozen=True)
class Laps:
    """What a way took, frame by frame."""

    name: str
    operations: float
    encoder: list[float]  # seconds, from pixels to visual tokens
    first_token: list[float]  # seconds, from pixels to the first token


def ways(model: str, folder: Path, threads: int | None) -> list[Way]:
    """The ways, each with a bundle of its own; bundles are made once."""
    whole = _opened(model, folder, None, threads)
    found = [Way("whole", whole, whole.engine.encode_pixels, 1.0)]
    for share in SHARES:
        session = _opened(model, folder, share, threads)
        engine, record = session.engine, session.manifest.encoder
        assert record.delta is not None  # exported with it
        if len(found) == 1:
            name = "whole, keys and values kept"
            found.append(Way(name, session, engine.encode_pixels, 1.0))
        camera = engine.camera(DeltaOptions(refresh=1 << 30))

        def encode(pixels: Pixels, session: Session = session, own: Any = camera) -> EncodedImage:
            return session.engine.encode_frame(own, pixels)

        name = f"{record.delta.patches} of {record.patches} patches"
        found.append(Way(name, session, encode, record.changed_share))
    return found


def _opened(model: str, folder: Path, share: float | None, threads: int | None) -> Session:
    path = folder / f"{model}-{'whole' if share is None else f'delta{share:g}'}"
    if not path.is_dir():
        make(Recipe(METHOD, path, _checkpoint(model, folder), parity=0, delta=share))
    return Session.open(path, threads=threads, tile_memory_mb=0)


def _checkpoint(model: str, folder: Path) -> str:
    if model == DEMO:
        return DEMO
    path = folder / model
    return str(path if path.is_dir() else write(SHAPES[model], path))


def frames(session: Session, changed: int, seed: int = 0) -> Iterator[Pixels]:
    """Endless frames; each has a square of at most `changed` patches that the last had not."""
    record, delta = session.manifest.image, session.manifest.encoder.delta
    assert delta is not None
    pixels = prepare(SAMPLES_DIR / "scene-1.png", record).pixels
    rng, side = np.random.default_rng(seed), delta.patch * isqrt(changed)
    while True:
        pixels = pixels.copy()
        top, left = (
            delta.patch * int(rng.integers(0, (size - side) // delta.patch + 1))
            for size in (record.height, record.width)
        )
        square = rng.standard_normal((3, side, side), np.float32)
        pixels[0, :, top : top + side, left : left + side] = square
        yield pixels


def measure(found: list[Way], rounds: int) -> list[Laps]:
    """Every way for every frame, each round in another order."""
    laps = [Laps(way.name, way.operations, [], []) for way in found]
    least = min(s.delta.patches for way in found if (s := way.session.manifest.encoder).delta)
    seen, said = frames(found[-1].session, least), Sampling(max_new_tokens=1)
    for lap in range(-WARM, rounds):
        pixels = next(seen)
        for turn in range(len(found)):
            number = (lap + turn) % len(found)
            way = found[number]
            started = time.perf_counter()
            image = way.encode(pixels)
            encoded = time.perf_counter()
            way.session.ask(image, QUESTION, said)
            ended = time.perf_counter()
            if lap >= 0:
                laps[number].encoder.append(encoded - started)
                laps[number].first_token.append(ended - started)
    return laps


def table(laps: list[Laps]) -> str:
    """Medians, and shares of the first way's time in the same round: 10%, 50% and 90%."""
    rows = [("encoded", "encoder, ms", "share", "operations", "first token, ms", "share")]
    first = laps[0]
    for one in laps:
        rows.append(
            (
                one.name,
                f"{1e3 * float(np.median(one.encoder)):.2f}",
                _share(one.encoder, first.encoder),
                f"{one.operations:.3f}",
                f"{1e3 * float(np.median(one.first_token)):.2f}",
                _share(one.first_token, first.first_token),
            )
        )
    return plain(rows)


def _share(seconds: list[float], whole: list[float]) -> str:
    low, middle, high = np.percentile(np.array(seconds) / np.array(whole), (10, 50, 90))
    return f"{middle:.3f} ({low:.3f}-{high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of frames, whole and patch by patch.")
    parser.add_argument("model", choices=(DEMO, *SHAPES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int)
    parser.add_argument("-o", "--output", type=Path, default=Path("out/delta-speed"))
    parser.add_argument("--json", type=Path, help="every round as JSON")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    laps = measure(ways(args.model, args.output, args.threads), args.rounds)
    print(table(laps))
    if args.json:
        record = {"model": args.model, "threads": args.threads, "laps": [asdict(x) for x in laps]}
        write_whole(args.json, json.dumps(record).encode())


if __name__ == "__main__":
    main()
