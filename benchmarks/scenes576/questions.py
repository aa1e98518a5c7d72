"""Questions about the scenes, their one right answer each, and the benchmark made of them.

Kinds:
- `color`, `shape`: bind two attributes of one object among look-alikes.
- `thin`: the color of a ring or a line, three pixels wide.
- `presence`: every "no" is a near miss; color and shape are both there, on different objects.
- `count`: objects of one shape, nought to six.
- `relation`: sides of two things that share a color or a shape.
- `place`: the half of the image in which an object lies.
- `read`: a two-digit number on a card.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.scenes576.scenes import (
    COLORS,
    MOST,
    PLURALS,
    SHAPES,
    SIZE,
    SOLID,
    THIN,
    Item,
    Scene,
    generator,
    make_scene,
)

KINDS = ("color", "shape", "thin", "presence", "count", "relation", "place", "read")
ANSWERS: dict[str, tuple[str, ...]] = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "thin": tuple(COLORS),
    "presence": ("yes", "no"),
    "count": tuple(str(n) for n in range(MOST + 1)),
    "relation": ("yes", "no", "left", "right", "above", "below"),
    "place": ("left", "right", "top", "bottom"),
    "read": tuple(str(n) for n in range(10, 100)),
}
_AXES = ((0, "left of", "right of"), (1, "above", "below"))
_HALVES = ((0, "left", "right"), (1, "top", "bottom"))
APART = SIZE // 8  # least distance of two objects whose sides are asked for, in pixels
_TRIES = 64  # scenes tried for one question with a wanted answer

Pairs = list[tuple[str, str]]
"""Questions with their answers."""


@dataclass(frozen=True)
class Question:
    """One question about the scene of `seed`, with its one right answer."""

    seed: int
    split: str
    kind: str
    text: str
    answer: str


def _unique(scene: Scene, attribute: str) -> dict[str, Item]:
    """Objects that are the only one with their shape (or color), by that shape (or color)."""
    values = [getattr(item, attribute) for item in scene.items]
    pairs = zip(values, scene.items, strict=True)
    return {value: item for value, item in pairs if values.count(value) == 1}


def _colors_of(scene: Scene, shapes: tuple[str, ...]) -> Pairs:
    unique = _unique(scene, "shape").items()
    return [(f"What color is the {s}?", item.color) for s, item in unique if s in shapes]


def _color(scene: Scene) -> Pairs:
    return _colors_of(scene, (*SOLID, "card"))


def _thin(scene: Scene) -> Pairs:
    return _colors_of(scene, THIN)


def _shape(scene: Scene) -> Pairs:
    unique = _unique(scene, "color").items()
    return [(f"What shape is the {color} object?", item.shape) for color, item in unique]


def _presence(scene: Scene) -> Pairs:
    there = {(item.color, item.shape) for item in scene.items}
    colors, shapes = (sorted({pair[i] for pair in there}) for i in (0, 1))
    return [
        (
            f"Is there {'an' if c[0] in 'aeiou' else 'a'} {c} {s}?",
            "yes" if (c, s) in there else "no",
        )
        for c in colors
        for s in shapes
    ]


def _count(scene: Scene) -> Pairs:
    shapes = [item.shape for item in scene.items]
    return [(f"How many {PLURALS[s]} are there?", str(shapes.count(s))) for s in SHAPES]


def _relation(scene: Scene) -> Pairs:
    """Both as "left of" with yes or no and as "left or right of", for pairs that lie apart."""
    pairs: Pairs = []
    for a in scene.items:
        for b in scene.items:
            if a is b or (a.color != b.color and a.shape != b.shape):
                continue
            first, second = (f"the {item.color} {item.shape}" for item in (a, b))
            for axis, low, high in _AXES:
                offset = (a.x - b.x, a.y - b.y)[axis]
                if abs(offset) < APART:
                    continue
                true = low if offset < 0 else high
                for side in (low, high):
                    answer = "yes" if side == true else "no"
                    pairs.append((f"Is {first} {side} {second}?", answer))
                either = f"{low.split()[0]} or {high}"
                pairs.append((f"Is {first} {either} {second}?", true.split()[0]))
    return pairs


def _place(scene: Scene) -> Pairs:
    pairs: Pairs = []
    for item in scene.items:
        for axis, low, high in _HALVES:
            offset = (item.x, item.y)[axis] - SIZE / 2
            if abs(offset) >= SIZE / 12:
                text = f"Is the {item.color} {item.shape} in the {low} or the {high} half?"
                pairs.append((text, low if offset < 0 else high))
    return pairs


def _read(scene: Scene) -> Pairs:
    numbers = [(item.color, item.number) for item in scene.items]
    return [
        (f"What number is on the {color} card?", f"{number[0]}{number[1]}")
        for color, number in numbers
        if number is not None
    ]


_ASK = {
    "color": _color,
    "shape": _shape,
    "thin": _thin,
    "presence": _presence,
    "count": _count,
    "relation": _relation,
    "place": _place,
    "read": _read,
}


def every_question(scene: Scene, kind: str) -> list[Question]:
    """All questions of one kind that the scene answers without ambiguity."""
    return [Question(scene.seed, scene.split, kind, *pair) for pair in _ASK[kind](scene)]


def _pick(
    rng: np.random.Generator, asked: list[Question], wanted: str | None = None
) -> Question | None:
    """One question; its answer is `wanted`, or drawn evenly from the answers there are."""
    answers = sorted({q.answer for q in asked})
    if not answers or (wanted is not None and wanted not in answers):
        return None
    chosen = wanted if wanted is not None else answers[rng.integers(len(answers))]
    matching = [q for q in asked if q.answer == chosen]
    return matching[rng.integers(len(matching))]


def ask(
    scene: Scene, rng: np.random.Generator, count: int, among: tuple[str, ...] = KINDS
) -> list[Question]:
    """`count` random questions about one scene, kinds and answers as even as it allows.

    A kind that is listed twice in `among` is asked twice as often. Half of the counts are the
    scene's largest, since small ones are in every scene.
    """
    by_kind: dict[str, dict[str, list[Question]]] = {}
    for kind in dict.fromkeys(among):
        for question in every_question(scene, kind):
            by_kind.setdefault(kind, {}).setdefault(question.answer, []).append(question)
    kinds = [kind for kind in among if kind in by_kind]
    chosen: list[Question] = []
    while len(chosen) < count:
        kind = kinds[rng.integers(len(kinds))]
        answers = sorted(by_kind[kind])
        largest = kind == "count" and rng.random() < 0.5
        matching = by_kind[kind][answers[-1 if largest else rng.integers(len(answers))]]
        chosen.append(matching[rng.integers(len(matching))])
    return chosen


def benchmark(n: int, split: str = "test") -> Iterator[Question]:
    """`n` questions, each about a scene of its own, evenly over kinds and over answers."""
    for i in range(n):
        kind = KINDS[i % len(KINDS)]
        wanted = ANSWERS[kind][i // len(KINDS) % len(ANSWERS[kind])]
        yield _question(kind, wanted, range(i * _TRIES, (i + 1) * _TRIES), split)


def _question(kind: str, wanted: str, seeds: range, split: str) -> Question:
    """The first question of these scenes with the wanted answer, else the first of its kind."""
    spare: Question | None = None
    for seed in seeds:
        asked = every_question(make_scene(seed, split), kind)
        rng = generator(seed, split, 3)
        question = _pick(rng, asked, wanted)
        if question is not None:
            return question
        spare = spare or _pick(rng, asked)
    if spare is None:
        raise RuntimeError(f"no scene of seeds {seeds} answers a {kind} question")
    return spare
