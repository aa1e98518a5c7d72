"""What encoding only changed patches loses on the demo, with sensor noise, and where it fails.

    python -m benchmarks.delta_accuracy --chains 420 --json benchmarks/results/delta.json

A chain is the frames of a fixed camera: in each, one thing jumps, or changes its colour, its shape
or its digit. The question is about the last frame; in most chains its answer is no longer that of
the first frame. Frames are asked of bundles with UTP at CR 4 whose last frame was encoded as a
whole, not at all (the features of the first frame), and by `Engine.camera`, each frame after the
other. Work is that of all frames but the first, as a share of encoding them as a whole.

Noise is Gaussian, of its standard deviation in grey levels of 256. The rows below the first ones
are what a camera should not do: be moved by pixels, stand under light that flickers, be watched
for long without a refresh. Bundles are kept in --output.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgeprune.bundle import Bundle
from edgeprune.demo.questions import KINDS, Question, every_question
from edgeprune.demo.scenes import (
    COLORS,
    GRID,
    PATCH,
    SHAPES,
    SPLITS,
    Scene,
    Thing,
    draw,
    load_digits,
    make_scene,
)
from edgeprune.files import write_whole
from edgeprune.intervals import difference
from edgeprune.making import make
from edgeprune.recipe import Recipe
from edgeprune.runtime import Sampling, Session
from edgeprune.runtime.backend import EncodedImage
from edgeprune.runtime.frames import REFRESH, THRESHOLD, DeltaOptions
from edgeprune.runtime.media import prepare
from edgeprune.spec import PruneSpec
from edgeprune.tables import plain

SHARES = (0.25, 0.125)
TRIES = 300  # moves of a thing that are tried


@dataclass(frozen=True)
class Case:
    """How a camera and its scene behave, and what is asked of the encoder."""

    name: str
    noise: float = 0.0  # standard deviation, of 256 grey levels
    changes: int = 2
    shake: int = 0  # pixels that a frame is moved by, at most
    flicker: float = 0.0  # share by which a frame is brighter or darker, at most
    threshold: float = THRESHOLD
    refresh: int = REFRESH


CASES = (
    Case("no noise"),
    *(Case(f"noise {noise:g}", noise) for noise in (2, 4, 8, 16)),
    Case("noise 16, threshold 0.04", 16, threshold=0.04),
    Case("noise 4, 10 changes", 4, changes=10),
    Case("noise 4, 10 changes, refresh 5", 4, changes=10, refresh=5),
    Case("noise 4, moved by 1 pixel", 4, shake=1),
    Case("noise 4, moved, threshold 0.2", 4, shake=1, threshold=0.2),
    Case("noise 4, light flickers by 5%", 4, flicker=0.05),
    Case("noise 4, light flickers, threshold 0.1", 4, flicker=0.05, threshold=0.1),
)


@dataclass(frozen=True)
class Chain:
    """Scenes of which each differs from the last in one thing, and a question about the last."""

    seed: int
    scenes: tuple[Scene, ...]
    question: Question
    changed: bool  # whether the answer is another one than in the first scene


@dataclass(frozen=True)
class Result:
    """One way to encode the frames of a case: which answers are right (1) or not."""

    case: str
    way: str
    work: float  # of the encoder, as a share of all frames as a whole
    whole: float  # share of frames that were encoded as a whole
    marks: str
    changed: str  # the same where the answer changed

    @property
    def right(self) -> float:
        """Percent."""
        return 100 * self.marks.count("1") / len(self.marks)


def chains(count: int, changes: int, split: str) -> Iterator[Chain]:
    """Chains of so many changes, evenly over kinds of questions."""
    found, seed = 0, 500_000
    while found < count:
        seed += 1
        rng = np.random.default_rng([seed, changes])
        scenes: list[Scene] | None = [make_scene(seed, split)]
        while scenes is not None and len(scenes) <= changes:
            moved = _moved(scenes[-1], rng)
            scenes = None if moved is None else [*scenes, moved]
        if scenes is None:
            continue
        kind = KINDS[found % len(KINDS)]
        before = {q.text: q.answer for q in every_question(scenes[0], kind)}
        asked = every_question(scenes[-1], kind)
        other = [q for q in asked if before.get(q.text, q.answer) != q.answer]
        if not asked or (not other and rng.random() < 0.8):
            continue
        among = other or asked
        yield Chain(seed, tuple(scenes), among[int(rng.integers(len(among)))], bool(other))
        found += 1


def _moved(scene: Scene, rng: np.random.Generator) -> Scene | None:
    """The scene with one thing changed; None where no try gave one as they are drawn."""
    for _ in range(TRIES):
        at = int(rng.integers(len(scene.things)))
        others = [thing for number, thing in enumerate(scene.things) if number != at]
        thing = _changed(scene.things[at], others, scene.split, rng)
        if thing is not None:
            things = list(scene.things)
            things[at] = thing
            return replace(scene, things=tuple(things))
    return None


def _changed(
    thing: Thing, others: Sequence[Thing], split: str, rng: np.random.Generator
) -> Thing | None:
    """Another place, colour, shape or digit; None where that cannot be."""
    if rng.random() < 0.4:
        cells = rng.integers(1, GRID - 1, 2)
        x, y = (PATCH * int(v) + PATCH // 2 + int(rng.integers(-2, 3)) for v in cells)
        gaps = (60 if "card" in (thing.shape, other.shape) else 46 for other in others)
        apart = (max(abs(x - other.x), abs(y - other.y)) for other in others)
        free = all(far >= gap for far, gap in zip(apart, gaps, strict=True))
        return replace(thing, x=x, y=y) if free else None
    if thing.shape == "card":
        digits = load_digits()
        index = int(rng.choice(np.flatnonzero(digits.splits == SPLITS.index(split))))
        digit = int(digits.labels[index])
        return None if digit == thing.digit else replace(thing, digit=digit, digit_index=index)
    colour = str(rng.choice(list(COLORS))) if rng.random() < 0.5 else thing.color
    shape = thing.shape if colour != thing.color else str(rng.choice(SHAPES[:-1]))
    if (shape, colour) in {(other.shape, other.color) for other in (*others, thing)}:
        return None
    return replace(thing, shape=shape, color=colour)


def frames(chain: Chain, case: Case) -> list[Image.Image]:
    """The chain as the camera of a case sees it."""
    rng, found = np.random.default_rng([chain.seed, 7]), list[Image.Image]()
    for scene in chain.scenes:
        levels = np.asarray(draw(scene), np.float32)
        if case.shake:
            levels = _shifted(levels, *rng.integers(-case.shake, case.shake + 1, 2))
        levels = levels * (1 + rng.uniform(-case.flicker, case.flicker))
        levels = levels + rng.normal(0, case.noise, levels.shape) if case.noise else levels
        found.append(Image.fromarray(np.clip(levels.round(), 0, 255).astype(np.uint8)))
    return found


def _shifted(levels: np.ndarray, down: int, right: int) -> np.ndarray:
    """Moved by pixels; what comes in is the edge."""
    most = max(abs(down), abs(right))
    padded = np.pad(levels, ((most, most), (most, most), (0, 0)), mode="edge")
    height, width = levels.shape[:2]
    top, left = most - down, most - right
    return padded[top : top + height, left : left + width]


class Camera:
    """One bundle, asked about chains of frames."""

    def __init__(self, path: Path) -> None:
        self.session = Session.open(path, threads=1)
        self.record = self.session.manifest.encoder
        assert self.record.delta is not None  # exported with it
        self.share = self.record.changed_share

    def said(self, image: EncodedImage, chain: Chain) -> str:
        """1 where the answer is right."""
        answer = self.session.ask(image, chain.question.text, Sampling(max_new_tokens=4))
        return str(int(answer.text.strip() == chain.question.answer))

    def whole(self, frame: Image.Image) -> EncodedImage:
        """A frame encoded as a whole."""
        pixels = prepare(frame, self.session.manifest.image).pixels
        return self.session.engine.encode_pixels(pixels)

    def watched(self, seen: Sequence[Image.Image], case: Case) -> tuple[EncodedImage, list[int]]:
        """The last frame, and how many patches of each but the first were encoded."""
        engine = self.session.engine
        camera = engine.camera(DeltaOptions(case.threshold, case.refresh))
        image, encoded = None, list[int]()
        for frame in seen:
            image = engine.encode_frame(camera, prepare(frame, self.session.manifest.image).pixels)
            encoded.append(image.patches_encoded or 0)
        assert image is not None
        return image, encoded[1:]

    def work(self, encoded: Sequence[int]) -> list[float]:
        """Of each frame, as a share of the whole encoder."""
        whole = self.record.patches
        return [0.0 if n == 0 else 1.0 if n == whole else self.share for n in encoded]


def run(case: Case, cameras: dict[str, Camera], count: int, split: str) -> Iterator[Result]:
    """Every way to encode the frames of a case."""
    ways = ("whole", "first frame", *cameras)
    marks, work = dict.fromkeys(ways, ""), {way: list[float]() for way in cameras}
    changed, first = "", next(iter(cameras.values()))
    for chain in chains(count, case.changes, split):
        seen = frames(chain, case)
        changed += str(int(chain.changed))
        marks["whole"] += first.said(first.whole(seen[-1]), chain)
        marks["first frame"] += first.said(first.whole(seen[0]), chain)
        for way, camera in cameras.items():
            image, encoded = camera.watched(seen, case)
            marks[way] += camera.said(image, chain)
            work[way] += camera.work(encoded)
    for way in ways:
        spent = work.get(way, [float(way == "whole")])
        those = "".join(m for m, c in zip(marks[way], changed, strict=True) if c == "1")
        whole = sum(one == 1.0 for one in spent) / len(spent)
        yield Result(case.name, way, sum(spent) / len(spent), whole, marks[way], those)


def table(results: Sequence[Result]) -> str:
    """A row for each; differences are to the last frame as a whole, on the same questions."""
    rows = [("frames", "last frame", "work", "whole", "right", "difference", "answer changed")]
    base = ""
    for one in results:
        base = one.marks if one.way == "whole" else base
        gain, half = difference(one.marks, base)
        rows.append(
            (
                one.case,
                one.way,
                f"{one.work:.2f}",
                f"{one.whole:.2f}",
                f"{one.right:.1f}",
                f"{100 * gain:+.1f} +- {100 * half:.1f}",
                f"{100 * one.changed.count('1') / len(one.changed):.1f}",
            )
        )
    return plain(rows)


def _bundle(share: float, folder: Path) -> Path:
    """A bundle of the demo, made once."""
    path = folder / f"demo-utp-cr4-delta{share:g}"
    if not path.is_dir():
        make(Recipe(PruneSpec("utp", 4), path, delta=share))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="What encoding only changed patches loses.")
    parser.add_argument("--chains", type=int, default=420)
    parser.add_argument("--cases", type=int, nargs="*", help="numbers of CASES (default: all)")
    parser.add_argument("--split", default="held_out", choices=SPLITS[1:3])
    parser.add_argument("-o", "--output", type=Path, default=Path("out/delta"))
    parser.add_argument("--json", type=Path, help="all results as JSON")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    cameras = dict[str, Camera]()
    for share in SHARES:
        path = _bundle(share, args.output)
        delta = Bundle.open(path, verify=False).manifest.encoder.delta
        assert delta is not None
        cameras[f"{delta.patches} patches"] = Camera(path)
    results = list[Result]()
    for case in [CASES[n] for n in args.cases] if args.cases else CASES:
        results += run(case, cameras, args.chains, args.split)
        print(table(results[-2 - len(cameras) :]), flush=True)
    if args.json:
        record: dict[str, Any] = {"chains": args.chains, "split": args.split}
        record["results"] = [asdict(one) for one in results]
        write_whole(args.json, json.dumps(record).encode())


if __name__ == "__main__":
    main()
