"""Questions about the demo scenes, their answers, and the benchmark made of them.

Six kinds, each of which asks for something that pruning visual tokens puts at risk: `color` and
`shape` (bind two attributes of one thing), `presence` (yes or no; every "no" is a near miss: the
color and the shape are both there, but not on one thing), `count` (nought to four), `relation`
(yes or no about where two things are) and `read` (a handwritten digit on a colored card).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from edgeprune.demo.scenes import COLORS, PLURALS, SHAPES, SIZE, Scene, Thing, draw, make_scene

KINDS = ("color", "shape", "presence", "count", "relation", "read")
ANSWERS: dict[str, tuple[str, ...]] = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "presence": ("yes", "no"),
    "count": ("0", "1", "2", "3", "4"),
    "relation": ("yes", "no"),
    "read": tuple("0123456789"),
}
_SIDES = (("left of", 0, -1), ("right of", 0, 1), ("above", 1, -1), ("below", 1, 1))
_TRIES = 64  # scenes tried for one question with a wanted answer


@dataclass(frozen=True)
class Question:
    """One question about the scene of `image_id` (its seed), with its one right answer."""

    image_id: int
    split: str
    kind: str
    text: str
    answer: str


def _unique(scene: Scene, attribute: str) -> dict[str, Thing]:
    """Things that are the only one with their shape (or color), by that shape (or color)."""
    values = [getattr(thing, attribute) for thing in scene.things]
    pairs = zip(values, scene.things, strict=True)
    return {v: thing for v, thing in pairs if values.count(v) == 1}


def _color(scene: Scene) -> list[tuple[str, str]]:
    unique = _unique(scene, "shape").items()
    return [(f"what color is the {shape} ?", thing.color) for shape, thing in unique]


def _shape(scene: Scene) -> list[tuple[str, str]]:
    unique = _unique(scene, "color").items()
    return [(f"what shape is the {color} object ?", thing.shape) for color, thing in unique]


def _presence(scene: Scene) -> list[tuple[str, str]]:
    there = {(thing.color, thing.shape) for thing in scene.things}
    colors = sorted({color for color, _ in there})
    shapes = sorted({shape for _, shape in there})
    return [
        (f"is there a {c} {s} ?", "yes" if (c, s) in there else "no")
        for c in colors
        for s in shapes
    ]


def _count(scene: Scene) -> list[tuple[str, str]]:
    shapes = [thing.shape for thing in scene.things]
    return [(f"how many {PLURALS[s]} are there ?", str(shapes.count(s))) for s in SHAPES]


def _relation(scene: Scene) -> list[tuple[str, str]]:
    """Only about pairs that lie at least a sixth of the image apart along the asked axis."""
    unique = _unique(scene, "shape")
    found = []
    for a, first in unique.items():
        for b, second in unique.items():
            offset = (first.x - second.x, first.y - second.y)
            for words, axis, sign in _SIDES:
                if a != b and abs(offset[axis]) >= SIZE / 6:
                    answer = "yes" if offset[axis] * sign > 0 else "no"
                    found.append((f"is the {a} {words} the {b} ?", answer))
    return found


def _read(scene: Scene) -> list[tuple[str, str]]:
    cards = [thing for thing in scene.things if thing.digit is not None]
    return [(f"what digit is on the {card.color} card ?", str(card.digit)) for card in cards]


_ASK = {
    "color": _color,
    "shape": _shape,
    "presence": _presence,
    "count": _count,
    "relation": _relation,
    "read": _read,
}


def every_question(scene: Scene, kind: str) -> list[Question]:
    """All questions of one kind that the scene answers without ambiguity."""
    pairs = _ASK[kind](scene)
    return [Question(scene.seed, scene.split, kind, text, answer) for text, answer in pairs]


def _pick(
    rng: np.random.Generator, found: list[Question], wanted: str | None = None
) -> Question | None:
    """One question; its answer is `wanted`, or drawn evenly from the answers there are."""
    answers = sorted({q.answer for q in found})
    if not answers or (wanted is not None and wanted not in answers):
        return None
    chosen = wanted if wanted is not None else answers[rng.integers(len(answers))]
    matching = [q for q in found if q.answer == chosen]
    return matching[rng.integers(len(matching))]


def ask(
    scene: Scene, rng: np.random.Generator, count: int, among: tuple[str, ...] = KINDS
) -> list[Question]:
    """`count` random questions about one scene, kinds and answers as even as it allows.

    A kind that is listed twice in `among` is asked twice as often.
    """
    by_kind = {kind: every_question(scene, kind) for kind in KINDS}
    kinds = [kind for kind in among if by_kind[kind]]
    chosen: list[Question] = []
    while len(chosen) < count:
        question = _pick(rng, by_kind[kinds[rng.integers(len(kinds))]])
        if question is not None:
            chosen.append(question)
    return chosen


def questions(seed: int, split: str = "held_out", count: int = 6) -> list[Question]:
    """`count` random questions about the scene of `seed`, the same on every call."""
    return ask(make_scene(seed, split), np.random.default_rng([seed, 2]), count)


def benchmark(n: int, split: str) -> Iterator[Question]:
    """`n` questions, each about a scene of its own, evenly over kinds and over answers."""
    for i in range(n):
        kind = KINDS[i % len(KINDS)]
        wanted = ANSWERS[kind][i // len(KINDS) % len(ANSWERS[kind])]
        spare: Question | None = None
        for seed in range(i * _TRIES, (i + 1) * _TRIES):
            found = every_question(make_scene(seed, split), kind)
            rng = np.random.default_rng([seed, 3])
            question = _pick(rng, found, wanted)
            if question is not None:
                break
            spare = spare or _pick(rng, found)
        else:
            question = spare
        if question is None:
            raise RuntimeError(f"no scene of seeds {i * _TRIES}.. answers a {kind} question")
        yield question


def held_out(n: int) -> Iterator[tuple[Image.Image, Question]]:
    """`n` held-out questions with their images, evenly over kinds."""
    for question in benchmark(n, "held_out"):
        yield draw(make_scene(question.image_id, question.split)), question


def calibration_samples(n: int) -> Iterator[tuple[Image.Image, Question]]:
    """`n` questions with images that are neither trained on nor held out."""
    for question in benchmark(n, "calibration"):
        yield draw(make_scene(question.image_id, question.split)), question
