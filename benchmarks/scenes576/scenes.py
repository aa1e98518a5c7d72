"""Drawn scenes of 336 x 336 pixels: what is in them, their pixels, and which patch shows what.

A scene holds five to ten small objects on a textured ground: look-alikes (same shape in another
color, same color on another shape), thin shapes, and cards with a two-digit number. One object
covers about 1% of the image. A scene follows from a seed and the name of a split, and from nothing
else. The splits use disjoint ranges of seeds and disjoint handwritten digits.

The digits are those of `edgeprune.demo` (UCI, CC BY 4.0).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from edgeprune.demo.scenes import _POLYGONS, load_digits

SIZE = 336  # width and height of a scene, in pixels
PATCH = 14  # width and height of a patch of the vision tower, in pixels
GRID = SIZE // PATCH  # patches per row and per column: 24

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (208, 32, 36),
    "green": (40, 160, 64),
    "blue": (40, 84, 222),
    "yellow": (246, 220, 50),
    "purple": (146, 54, 190),
    "white": (246, 246, 244),
    "orange": (250, 130, 22),
    "black": (18, 18, 22),
}
SOLID = ("circle", "square", "triangle", "star", "cross", "heart")
THIN = ("ring", "line")
SHAPES = (*SOLID, *THIN, "card")
PLURALS = {s: s + ("es" if s == "cross" else "s") for s in SHAPES}
MOST = 6  # objects of one shape

SPLITS = ("train", "validation", "test", "calibration")
SPLIT_SEEDS = 10**9  # seeds per split
_GAP = 5  # least distance between two objects, in pixels
_CARD = (38, 28)  # width and height of a card


@dataclass(frozen=True)
class Item:
    """One object. Lengths are in pixels, the origin at top left."""

    shape: str
    color: str
    x: int  # centre
    y: int
    size: int  # width and height of its square; of a card, its width
    turn: int = 0  # rotation, in degrees
    digits: tuple[int, int] | None = None  # indices of two images of `digits.npz`: tens, ones

    @property
    def number(self) -> tuple[int, int] | None:
        """The two digits on a card: tens and ones."""
        if self.digits is None:
            return None
        labels = load_digits().labels
        return int(labels[self.digits[0]]), int(labels[self.digits[1]])


@dataclass(frozen=True)
class Scene:
    """What is in a scene; `draw` gives its pixels."""

    seed: int
    split: str
    items: tuple[Item, ...]


def generator(seed: int, split: str, stream: int) -> np.random.Generator:
    """A random generator for one scene. Streams: 0 objects, 1 pixels, 2 and on questions."""
    if not 0 <= seed < SPLIT_SEEDS:
        raise ValueError(f"seed {seed} is outside 0..{SPLIT_SEEDS - 1}")
    return np.random.default_rng([SPLITS.index(split) * SPLIT_SEEDS + seed, stream])


@cache
def _digit_indices(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the split's digits: of those that may be tens (1 to 9), and of all."""
    digits = load_digits()
    own = np.flatnonzero(digits.splits == SPLITS.index(split))
    return own[digits.labels[own] > 0], own


def choose_pairs(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """`count` distinct (shape, color) pairs: cards, a repeated shape, look-alikes, others."""
    names = list(COLORS)
    pairs: list[tuple[str, str]] = []

    def add(shape: str, color: str) -> None:
        same = sum(s == shape for s, _ in pairs)
        if len(pairs) < count and (shape, color) not in pairs and same < MOST:
            pairs.append((shape, color))

    def any_color() -> str:
        return names[rng.integers(len(names))]

    for color in rng.permutation(names)[: rng.choice(4, p=(0.3, 0.3, 0.25, 0.15))]:
        add("card", str(color))
    if rng.random() < 0.6:
        repeated = SHAPES[rng.integers(len(SHAPES) - 1)]
        for color in rng.permutation(names)[: rng.integers(2, MOST + 1)]:
            add(repeated, str(color))
    while len(pairs) < count:
        shape, color = SHAPES[rng.integers(len(SHAPES) - 1)], any_color()
        if pairs and rng.random() < 0.5:  # a look-alike of one that is there
            other = pairs[rng.integers(len(pairs))]
            if rng.random() < 0.5 and other[0] != "card":
                shape = other[0]
            else:
                color = other[1]
        add(shape, color)
    return pairs


def place(rng: np.random.Generator, sizes: list[int]) -> list[tuple[int, int]]:
    """Centres of squares of the given sizes that do not touch each other or the border."""
    while True:
        centres: list[tuple[int, int]] = []
        for i, size in enumerate(sizes):
            low = size // 2 + 2
            for _ in range(40):
                x, y = (int(v) for v in rng.integers(low, SIZE - low, 2))
                if all(
                    max(abs(x - a), abs(y - b)) >= (size + sizes[j]) // 2 + _GAP
                    for j, (a, b) in enumerate(centres)
                ):
                    centres.append((x, y))
                    break
            if len(centres) <= i:
                break
        if len(centres) == len(sizes):
            return centres


def make_scene(seed: int, split: str = "test") -> Scene:
    """The scene of a seed: five to ten objects that do not touch."""
    rng = generator(seed, split, 0)
    pairs = choose_pairs(rng, int(rng.integers(5, 11)))
    sizes = [_size(rng, shape) for shape, _ in pairs]
    items = []
    for (shape, color), size, (x, y) in zip(pairs, sizes, place(rng, sizes), strict=True):
        if shape == "card":
            tens, every = _digit_indices(split)
            digits = int(rng.choice(tens)), int(rng.choice(every))
            items.append(Item(shape, color, x, y, size, 0, digits))
        else:
            turn = int(rng.integers(36)) * 5 if shape == "line" else int(rng.integers(-2, 3)) * 5
            items.append(Item(shape, color, x, y, size, turn))
    return Scene(seed, split, tuple(items))


def _size(rng: np.random.Generator, shape: str) -> int:
    if shape == "card":
        return _CARD[0]
    if shape in THIN:
        return int(rng.integers(15, 19)) * 2
    return int(rng.integers(11, 18)) * 2


@cache
def mask(shape: str, size: int, turn: int) -> np.ndarray:
    """Coverage of a shape, float32 [height, width] in 0..1, antialiased."""
    scale = 6
    width, height = (size, _CARD[1]) if shape == "card" else (size, size)
    sheet = Image.new("L", (width * scale, height * scale))
    pen = ImageDraw.Draw(sheet)
    half, box = size * scale / 2, (0, 0, width * scale - 1, height * scale - 1)
    if shape == "circle":
        pen.ellipse(box, fill=255)
    elif shape == "ring":
        pen.ellipse(box, outline=255, width=3 * scale)
    elif shape == "line":
        pen.rectangle((0, half - 1.75 * scale, 2 * half - 1, half + 1.75 * scale), fill=255)
    elif shape == "card":
        pen.rounded_rectangle(box, radius=4 * scale, fill=255)
    else:
        pen.polygon([(half + half * x, half + half * y) for x, y in _POLYGONS[shape]], fill=255)
    if turn:
        sheet = sheet.rotate(turn, Image.Resampling.BICUBIC)
    small = sheet.resize((width, height), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 255


@cache
def _ink(index: int, size: int) -> np.ndarray:
    """Ink of a handwritten digit, float32 [size, size] in 0..1."""
    image = Image.fromarray((load_digits().images[index] * 15).astype(np.uint8))
    big = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(big, dtype=np.float32) / 200, 0, 1)


def _blend(canvas: np.ndarray, x: int, y: int, part: np.ndarray, color: np.ndarray) -> None:
    """Paint `color` ([3] or [height, 1, 3]) through `part` [height, width], centred at (x, y)."""
    height, width = part.shape
    top, left = y - height // 2, x - width // 2
    region = canvas[top : top + height, left : left + width]
    region += part[: region.shape[0], : region.shape[1], None] * (color - region)


def _stretched(rough: np.ndarray) -> np.ndarray:
    """A small array [rows, columns] as a smooth one [SIZE, SIZE]."""
    image = Image.fromarray(rough.astype(np.float32))
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def _ground(rng: np.random.Generator) -> np.ndarray:
    """A muted ground: clouds with grain, grain of wood, ripples or tiles; [SIZE, SIZE, 3]."""
    base = (rng.uniform(95, 150) + rng.uniform(-16, 16, 3)).astype(np.float32)
    tone = _stretched(rng.normal(0, 14, (5, 5)))
    kind = rng.integers(4)
    if kind == 0:
        tone = tone + _stretched(rng.normal(0, 10, (28, 28)))
    elif kind == 1:
        tone = tone + _stretched(rng.normal(0, 11, (90, 4) if rng.random() < 0.5 else (4, 90)))
    elif kind == 2:
        angle, length = rng.uniform(0, np.pi), rng.uniform(9, 40)
        along = np.arange(SIZE, dtype=np.float32) * (2 * np.pi / length)
        x, y = along * np.float32(np.cos(angle)), along * np.float32(np.sin(angle))
        # sin(x + y), from vectors alone
        waves = np.outer(np.cos(y), np.sin(x)) + np.outer(np.sin(y), np.cos(x))
        tone = tone + np.float32(8) * waves
    else:
        cells = int(rng.integers(6, 30))
        rough = rng.normal(0, 9, (cells, cells)).astype(np.float32)
        index = np.arange(SIZE) * cells // SIZE
        tone = tone + rough[index][:, index]
    tone = tone + rng.integers(-7, 8, (SIZE, SIZE), dtype=np.int8)
    return tone[..., None] + base


def draw(scene: Scene) -> Image.Image:
    """The pixels of a scene: an RGB image of 336 x 336."""
    rng = generator(scene.seed, scene.split, 1)
    canvas = _ground(rng)
    for item in scene.items:
        part = mask(item.shape, item.size, item.turn)
        color = np.array(COLORS[item.color], dtype=np.float32) + rng.uniform(-12, 12, 3)
        shade = np.linspace(1.05, 0.9, len(part), dtype=np.float32)[:, None, None]
        if item.shape not in THIN:
            _blend(canvas, item.x + 1, item.y + 1, part * 0.35, np.zeros(3, dtype=np.float32))
        _blend(canvas, item.x, item.y, part, (color * shade).astype(np.float32))
        if item.digits is not None:
            dark = item.color in ("yellow", "white", "orange")
            ink = np.full(3, 15 if dark else 250, dtype=np.float32)
            for index, dx in zip(item.digits, (-8, 8), strict=True):
                size = int(rng.choice([16, 17, 18]))
                _blend(canvas, item.x + dx, item.y + int(rng.integers(-1, 2)),
                       _ink(index, size), ink)  # fmt: skip
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))


def coverage(scene: Scene) -> np.ndarray:
    """Which object each patch shows, int64 [24, 24]: its index, or -1 for bare ground.

    An object is on a patch where it covers a tenth of it; the patch of its centre is always its.
    """
    best = np.full((GRID, GRID), 0.1, dtype=np.float32)
    owner = np.full((GRID, GRID), -1, dtype=np.int64)
    for i, item in enumerate(scene.items):
        part = mask(item.shape, item.size, item.turn)
        top, left = item.y - part.shape[0] // 2, item.x - part.shape[1] // 2
        row, column = top // PATCH, left // PATCH
        rows = (top + part.shape[0] - 1) // PATCH - row + 1
        columns = (left + part.shape[1] - 1) // PATCH - column + 1
        window = np.zeros((rows * PATCH, columns * PATCH), dtype=np.float32)
        dy, dx = top - row * PATCH, left - column * PATCH
        window[dy : dy + part.shape[0], dx : dx + part.shape[1]] = part
        share = window.reshape(rows, PATCH, columns, PATCH).mean((1, 3))
        here = np.s_[row : row + rows, column : column + columns]
        owner[here][share > best[here]] = i
        best[here] = np.maximum(best[here], share)
    for i, item in enumerate(scene.items):
        owner[item.y // PATCH, item.x // PATCH] = i
    return owner
