"""Procedurally drawn scenes for the embedded demo model: what is in them, and their pixels.

A scene is three to six coloured things on a textured ground, drawn with NumPy and Pillow alone.
It follows from a seed and the name of a split, and from nothing else.  The splits use disjoint
ranges of seeds and disjoint handwritten digits, so nothing that the demo model is tested on, and
nothing that a pruning method is calibrated on, was ever seen in training.

The digits on the cards come from `digits.npz`: the "Optical Recognition of Handwritten Digits"
data of the UCI Machine Learning Repository (E. Alpaydin and C. Kaynak, 1998), 1,797 images of 8x8
pixels as distributed with scikit-learn, under the licence CC BY 4.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIZE = 168  # width and height of a scene, in pixels
PATCH = 14  # width and height of a patch of the vision tower, in pixels
GRID = SIZE // PATCH  # patches per row and per column

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (48, 168, 72),
    "blue": (44, 92, 220),
    "yellow": (244, 208, 48),
    "purple": (150, 60, 190),
    "white": (246, 246, 244),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "card")
PLURALS = {s: s + ("es" if s == "cross" else "s") for s in SHAPES}

_SPLIT_SEEDS = 10**9  # seeds per split
SPLITS = ("train", "validation", "held_out", "calibration")
_CARD = 40  # width and height of a card, in pixels


@dataclass(frozen=True)
class Thing:
    """One drawn thing.  Lengths are in pixels of the 168x168 scene, the origin at top left."""

    shape: str
    color: str
    x: int  # centre
    y: int
    size: int  # width and height
    turn: int = 0  # rotation, in degrees
    digit: int | None = None  # the digit written on a card
    digit_index: int | None = None  # which image of `digits.npz` it is


@dataclass(frozen=True)
class Scene:
    """What is in a scene; `draw` gives its pixels."""

    seed: int
    split: str
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Digits:
    """Handwritten digits: `images` uint8 [n, 8, 8] in 0..16, `labels` and `splits` uint8 [n]."""

    images: np.ndarray
    labels: np.ndarray
    splits: np.ndarray  # index into SPLITS


@cache
def load_digits() -> Digits:
    """The handwritten digits shipped with the package."""
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as data:
        return Digits(data["images"], data["labels"], data["splits"])


@cache
def _digit_indices(split: str) -> np.ndarray:
    return np.flatnonzero(load_digits().splits == SPLITS.index(split))


def _generator(seed: int, split: str, stream: int) -> np.random.Generator:
    """A random generator for one scene; stream 0 chooses the things, stream 1 the ground."""
    if not 0 <= seed < _SPLIT_SEEDS:
        raise ValueError(f"seed {seed} is outside 0..{_SPLIT_SEEDS - 1}")
    return np.random.default_rng([SPLITS.index(split) * _SPLIT_SEEDS + seed, stream])


def choose_kinds(
    rng: np.random.Generator, count: int, cards: tuple[float, ...] = (0.35, 0.3, 0.35)
) -> list[tuple[str, str]]:
    """`count` distinct (shape, color) pairs.

    Half of the scenes repeat one shape two to four times; `cards` are the chances of zero, one,
    two, ... cards (cards of one scene differ in color, as all its pairs do).
    """
    names = list(COLORS)
    pairs: list[tuple[str, str]] = []

    def add(shape: str, color: str) -> None:
        if len(pairs) < count and (shape, color) not in pairs:
            pairs.append((shape, color))

    for color in rng.permutation(names)[: rng.choice(len(cards), p=cards)]:
        add("card", str(color))
    if rng.random() < 0.5:
        repeated = SHAPES[rng.integers(len(SHAPES) - 1)]
        for color in rng.permutation(names)[: rng.integers(2, 5)]:
            add(repeated, str(color))
    while len(pairs) < count:
        add(SHAPES[rng.integers(len(SHAPES) - 1)], names[rng.integers(len(names))])
    return pairs


def place(rng: np.random.Generator, wide: list[bool], grid: int, gap: int) -> list[tuple[int, int]]:
    """Cells (column, row) for things on a grid, `gap` cells apart (one more if either is wide).

    The outermost ring of cells stays free of centres where `gap` is 2 or more.
    """
    margin = 1 if gap > 1 else 0
    while True:
        cells: list[tuple[int, int]] = []
        for i, is_wide in enumerate(wide):
            for _ in range(30):
                x, y = (int(v) for v in rng.integers(margin, grid - margin, 2))
                near = (
                    max(abs(x - a), abs(y - b)) < gap + int(gap > 1 and (is_wide or wide[j]))
                    for j, (a, b) in enumerate(cells)
                )
                if not any(near):
                    cells.append((x, y))
                    break
            if len(cells) <= i:
                break
        if len(cells) == len(wide):
            return cells


def make_scene(
    seed: int,
    split: str = "held_out",
    count: int | None = None,
    cards: tuple[float, ...] = (0.35, 0.3, 0.35),
) -> Scene:
    """The scene of a seed: three to six things, or exactly `count`, that do not overlap.

    Training may ask for another number of things and for other chances of 0, 1, 2, ... cards.
    """
    rng = _generator(seed, split, 0)
    kinds = choose_kinds(rng, count or int(rng.integers(3, 7)), cards)
    cells = place(rng, [shape == "card" for shape, _ in kinds], GRID, 3)
    things = []
    for (shape, color), (column, row) in zip(kinds, cells, strict=True):
        x, y = (PATCH * v + PATCH // 2 + int(rng.integers(-2, 3)) for v in (column, row))
        if shape == "card":
            index = int(rng.choice(_digit_indices(split)))
            digit = int(load_digits().labels[index])
            things.append(Thing(shape, color, x, y, _CARD, 0, digit, index))
        else:
            size = int(rng.choice([30, 32, 34, 36]))
            things.append(Thing(shape, color, x, y, size, int(rng.integers(-2, 3)) * 5))
    return Scene(seed, split, tuple(things))


def _star(points: int, inner: float) -> list[tuple[float, float]]:
    angles = np.arange(2 * points) * np.pi / points - np.pi / 2
    radii = np.where(np.arange(2 * points) % 2 == 0, 1.0, inner)
    return [
        (float(r * np.cos(a)), float(r * np.sin(a))) for r, a in zip(radii, angles, strict=True)
    ]


def _heart() -> list[tuple[float, float]]:
    t = np.linspace(0, 2 * np.pi, 80)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return [(float(a / 17), float(-(b + 2.5) / 16)) for a, b in zip(x, y, strict=True)]


_POLYGONS: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
    "triangle": [(0, -0.98), (1, 0.82), (-1, 0.82)],
    "star": _star(5, 0.42),
    "heart": _heart(),
    "cross": [
        (-0.33, -1), (0.33, -1), (0.33, -0.33), (1, -0.33), (1, 0.33), (0.33, 0.33),
        (0.33, 1), (-0.33, 1), (-0.33, 0.33), (-1, 0.33), (-1, -0.33), (-0.33, -0.33),
    ],
}  # fmt: skip


@cache
def _mask(shape: str, size: int, turn: int) -> np.ndarray:
    """Coverage of a shape, float32 [size, size] in 0..1, antialiased."""
    scale = 8
    drawn = Image.new("L", (size * scale, size * scale))
    pen = ImageDraw.Draw(drawn)
    half = size * scale / 2
    if shape == "circle":
        pen.ellipse((0, 0, 2 * half - 1, 2 * half - 1), fill=255)
    elif shape == "card":
        pen.rounded_rectangle((0, 0, 2 * half - 1, 2 * half - 1), radius=4 * scale, fill=255)
    else:
        pen.polygon([(half + half * x, half + half * y) for x, y in _POLYGONS[shape]], fill=255)
        drawn = drawn.rotate(turn, Image.Resampling.BICUBIC)
    small = drawn.resize((size, size), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 255


@cache
def _ink(index: int, size: int, turn: int) -> np.ndarray:
    """Ink of a handwritten digit, float32 [size, size] in 0..1."""
    image = Image.fromarray((load_digits().images[index] * 15).astype(np.uint8))
    big = image.resize((size, size), Image.Resampling.BICUBIC)
    big = big.rotate(turn, Image.Resampling.BICUBIC)
    return np.clip(np.asarray(big, dtype=np.float32) / 200, 0, 1)


def _blend(canvas: np.ndarray, x: int, y: int, mask: np.ndarray, color: np.ndarray) -> None:
    """Paint `color` ([3] or [h, 1 or w, 3]) through `mask` [h, w], its centre at pixel (x, y)."""
    h, w = mask.shape
    top, left = y - h // 2, x - w // 2
    t, b, lo, hi = max(top, 0), min(top + h, SIZE), max(left, 0), min(left + w, SIZE)
    part = mask[t - top : b - top, lo - left : hi - left, None]
    if color.ndim == 3:
        color = np.broadcast_to(color, (h, w, 3))[t - top : b - top, lo - left : hi - left]
    region = canvas[t:b, lo:hi]
    region += part * (color - region)


def _ground(rng: np.random.Generator) -> np.ndarray:
    """A muted, cloudy, grainy ground, float32 [168, 168, 3] in 0..255."""
    base = rng.uniform(85, 150) + rng.uniform(-14, 14, 3)
    cloud = np.zeros((SIZE, SIZE), dtype=np.float32)
    for cells, strength in ((4, 16.0), (14, 9.0)):
        rough = Image.fromarray(rng.normal(0, strength, (cells, cells)).astype(np.float32))
        cloud += np.asarray(rough.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    cloud += rng.integers(-6, 7, (SIZE, SIZE), dtype=np.int8)
    return base.astype(np.float32) + cloud[..., None]


def draw(scene: Scene) -> Image.Image:
    """The pixels of a scene: an RGB image of 168x168."""
    rng = _generator(scene.seed, scene.split, 1)
    canvas = _ground(rng)
    for thing in scene.things:
        mask = _mask(thing.shape, thing.size, thing.turn)
        color = np.array(COLORS[thing.color], dtype=np.float32) + rng.uniform(-14, 14, 3)
        shade = np.linspace(1.06, 0.88, thing.size, dtype=np.float32)[:, None, None]
        _blend(canvas, thing.x + 2, thing.y + 2, mask * 0.4, np.zeros(3, dtype=np.float32))
        _blend(canvas, thing.x, thing.y, mask, (color * shade).astype(np.float32))
        if thing.digit_index is not None:
            dark = thing.color in ("yellow", "white")
            ink = np.full(3, 20 if dark else 250, dtype=np.float32)
            size = int(rng.choice([32, 34, 36]))
            dx, dy, turn = (int(v) for v in rng.integers(-1, 2, 3))
            mask = _ink(thing.digit_index, size, 6 * turn)
            _blend(canvas, thing.x + dx, thing.y + dy, mask, ink)
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))


def coverage(scene: Scene) -> np.ndarray:
    """Which thing each patch shows, int64 [12, 12]: its index, or -1 for bare ground."""
    best = np.full((GRID, GRID), 0.22, dtype=np.float32)
    owner = np.full((GRID, GRID), -1, dtype=np.int64)
    for i, thing in enumerate(scene.things):
        canvas = np.zeros((SIZE, SIZE, 1), dtype=np.float32)
        mask = _mask(thing.shape, thing.size, thing.turn)
        _blend(canvas, thing.x, thing.y, mask, np.ones(1, dtype=np.float32))
        share = canvas.reshape(GRID, PATCH, GRID, PATCH).mean((1, 3))
        owner[share > best] = i
        best = np.maximum(best, share)
    return owner
