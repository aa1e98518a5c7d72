"""Large scenes whose details are lost in the view of the whole image, and questions about them.

A scene of 168 x 168 pixels is cut into 3 x 3 tiles of 56 pixels; the overview shows it in 56 x 56.
It holds three to six things, each of a color of its own: one to three cards with a handwritten
digit of 15 pixels, which is 5 in the overview, and shapes of 20 to 26 pixels, which are 7 to 9
there. A thing never crosses the border of a tile. A scene follows from its split and its seed;
splits have handwritten digits of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from edgeprune.demo.scenes import COLORS, SPLITS, load_digits

SIDE, TILE, GRID = 168, 56, 3
TOKEN = 14
"""Pixels a side of a visual token of a tile."""
PLAIN = ("circle", "square", "triangle", "star", "cross")
KINDS = ("read", "find", "color", "shape")
"""The first two ask for digits, the others for what the overview shows too."""
_STARTS = ((0, 42), (56, 84), (84, 112), (126, 168))
"""Where a thing may be, on either axis: within one tile, and one token of the overview."""
_CARD, _DIGIT = 21, 15
_DARK_INK = ("yellow", "white")


@dataclass(frozen=True)
class Thing:
    """Pixels of the scene; `slot` is the overview's token that shows it, row by row."""

    shape: str
    color: str
    left: int
    top: int
    size: int
    slot: int
    digit: int | None = None
    digit_index: int | None = None  # of the package's digits


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


def make_scene(
    seed: int, split: str, cards: int | None = None, shapes: int | None = None
) -> tuple[Thing, ...]:
    """The things of a scene; a number of cards and shapes of any colors for training on tiles."""
    rng = np.random.default_rng([SPLITS.index(split), seed, 5])
    crowded = cards is not None
    if cards is None or shapes is None:
        cards = int(rng.integers(1, 4))
        shapes = int(rng.integers(max(1, 3 - cards), 7 - cards))
    names = list(COLORS)
    colors = [names[i] for i in rng.permutation(len(names))]
    if crowded:
        colors = [names[i] for i in rng.integers(0, len(names), cards + shapes)]
    plain = rng.integers(0, len(PLAIN), shapes) if crowded else rng.permutation(len(PLAIN))
    found, digits = list[Thing](), set[int]()
    for number, slot in enumerate(rng.permutation(16)[: cards + shapes]):
        digit = index = None
        shape, size = "card", _CARD
        if number < cards:
            index, digit = _digit(rng, split, set() if crowded else digits)
            digits.add(digit)
        else:
            shape, size = PLAIN[plain[number - cards]], int(rng.integers(20, 27))
        top, left = (_within(rng, _STARTS[at], size) for at in divmod(int(slot), 4))
        found.append(Thing(shape, colors[number], left, top, size, int(slot), digit, index))
    return tuple(found)


def _digit(rng: np.random.Generator, split: str, taken: set[int]) -> tuple[int, int]:
    digits = load_digits()
    own = np.flatnonzero(digits.splits == SPLITS.index(split))
    while True:
        index = int(rng.choice(own))
        if (digit := int(digits.labels[index])) not in taken:
            return index, digit


def _within(rng: np.random.Generator, span: tuple[int, int], size: int) -> int:
    low, high = span
    return int(rng.integers(low + 1, high - size))


def draw(things: tuple[Thing, ...], seed: int, split: str) -> Image.Image:
    """The pixels of a scene."""
    rng = np.random.default_rng([SPLITS.index(split), seed, 6])
    rough = rng.normal(0, 10, (6, 6)).astype(np.float32)
    cloud = np.asarray(Image.fromarray(rough).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    ground = rng.uniform(85, 150) + rng.uniform(-14, 14, 3)
    levels = ground + (cloud + rng.normal(0, 4, (SIDE, SIDE)))[..., None]
    image = Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))
    for thing in things:
        shade = np.clip(np.array(COLORS[thing.color]) + rng.uniform(-12, 12, 3), 0, 255)
        color = tuple(int(level) for level in shade)
        image.paste(color, (thing.left, thing.top), _mask(thing.shape, thing.size))
        if thing.digit_index is not None:
            ink = (20, 20, 20) if thing.color in _DARK_INK else (250, 250, 250)
            off = (thing.size - _DIGIT) // 2
            image.paste(ink, (thing.left + off, thing.top + off), _ink(thing.digit_index))
    return image


@cache
def _mask(shape: str, size: int) -> Image.Image:
    """Coverage of a shape, antialiased."""
    scale = 4
    drawn = Image.new("L", (size * scale, size * scale))
    pen, end = ImageDraw.Draw(drawn), size * scale - 1
    if shape == "circle":
        pen.ellipse((0, 0, end, end), fill=255)
    elif shape in ("card", "square"):
        pen.rectangle((0, 0, end, end), fill=255)
    else:
        half = end / 2
        pen.polygon([(half + half * x, half + half * y) for x, y in _POLYGONS[shape]], fill=255)
    return drawn.resize((size, size), Image.Resampling.BOX)


def _star() -> list[tuple[float, float]]:
    angles = np.arange(10) * np.pi / 5 - np.pi / 2
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    return [
        (float(r * np.cos(a)), float(r * np.sin(a))) for r, a in zip(radii, angles, strict=True)
    ]


_POLYGONS = {
    "triangle": [(0.0, -1.0), (1.0, 0.9), (-1.0, 0.9)],
    "star": _star(),
    "cross": [
        (-0.33, -1.0), (0.33, -1.0), (0.33, -0.33), (1.0, -0.33), (1.0, 0.33), (0.33, 0.33),
        (0.33, 1.0), (-0.33, 1.0), (-0.33, 0.33), (-1.0, 0.33), (-1.0, -0.33), (-0.33, -0.33),
    ],
}  # fmt: skip


@cache
def _ink(index: int) -> Image.Image:
    levels = (load_digits().images[index] * 15).astype(np.uint8)
    big = Image.fromarray(levels).resize((_DIGIT, _DIGIT), Image.Resampling.BICUBIC)
    return big.point(lambda level: min(255, level * 5 // 4))


def coverage(things: tuple[Thing, ...]) -> NDArray[np.int64]:
    """The thing that each visual token of the 12 x 12 of all tiles shows, or -1."""
    count = SIDE // TOKEN
    best = np.full((count, count), 0.2)
    owner = np.full((count, count), -1)
    edges = np.arange(count) * TOKEN
    for number, thing in enumerate(things):
        rows, columns = (
            np.clip(np.minimum(edges + TOKEN, at + thing.size) - np.maximum(edges, at), 0, None)
            for at in (thing.top, thing.left)
        )
        share = rows[:, None] * columns[None] / TOKEN**2
        owner[share > best] = number
        best = np.maximum(best, share)
    return owner


def every_question(things: tuple[Thing, ...]) -> list[Question]:
    """All questions that a scene answers."""
    found = []
    for thing in things:
        found.append(Question("shape", f"what shape is the object in {thing.color} ?", thing.shape))
        if thing.digit is None:
            found.append(Question("color", f"what color is the {thing.shape} ?", thing.color))
            continue
        text = f"what digit is on the card in {thing.color} ?"
        found.append(Question("read", text, str(thing.digit)))
        found.append(Question("find", f"what color is the {thing.digit} ?", thing.color))
    return found


def question(things: tuple[Thing, ...], kind: str, seed: int) -> Question:
    """One of a kind; every scene has some of each."""
    own = [one for one in every_question(things) if one.kind == kind]
    return own[int(np.random.default_rng([seed, 7]).integers(len(own)))]
