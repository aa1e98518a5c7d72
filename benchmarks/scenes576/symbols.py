"""Ideal visual tokens: what a perfect tower and projector would tell the language model.

An ideal token is the sum of rows of a table, for the color, shape and digits that a patch shows,
for ground and for an object's centre, and of smooth functions of the patch's place. The rows of
words are the language model's own embeddings, with most of a group's mean taken away, since colors
resemble each other more than they differ. The digits of a number have rows of their own as tens and
as ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.scenes576.questions import KINDS
from benchmarks.scenes576.scenes import (
    COLORS,
    GRID,
    PATCH,
    SHAPES,
    SIZE,
    Item,
    Scene,
    choose_pairs,
)

NONE = 0  # no symbol: a row of zeros
COLOR = 1
SHAPE = COLOR + len(COLORS)
TENS = SHAPE + len(SHAPES)
ONES = TENS + 10
GROUND = ONES + 10
CENTRE = GROUND + 1
ROWS = CENTRE + 1
GROUPS = {"color": (COLOR, SHAPE), "shape": (SHAPE, TENS), "tens": (TENS, ONES),
          "ones": (ONES, GROUND)}  # fmt: skip
PAIRS = [(s, c) for s in SHAPES for c in COLORS]
PRESENT = len(PAIRS) + 20  # what [CLS] is trained to know: pairs, then tens, then ones
LENGTH = 2.3  # of a row, and of a place: that of the embeddings of these words
_FREQUENCIES = (1, 2, 4, 8)
WAVES = 2 * (1 + 2 * len(_FREQUENCIES))
AMONG = (*KINDS, "count", "relation", "read")


@dataclass
class Table:
    """Rows of symbols [ROWS, width] and directions of places [WAVES, width]."""

    rows: Tensor
    places: Tensor

    def ideal(self, symbols: Tensor) -> Tensor:
        """Ideal tokens float32 [batch, patches, width] of symbols uint8 [batch, patches, 5]."""
        grid = int(symbols.shape[1] ** 0.5)
        waves = place_waves(grid).to(self.rows.device)
        return self.rows[symbols.long()].sum(2) + waves @ self.places


def make_table(embed: Tensor, token_of: Callable[[str], int], seed: int = 0) -> Table:
    """The table for a language model's embeddings [vocabulary, width]."""
    generator = torch.Generator().manual_seed(seed)
    width = embed.shape[1]
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    rows = torch.zeros(ROWS, width)
    words = [*COLORS, *SHAPES, *"0123456789"]
    ids = torch.tensor([token_of(word) for word in words])
    rows[COLOR:ONES] = embed[ids].float().cpu()
    for first, end in list(GROUPS.values())[:3]:
        rows[first:end] -= 0.7 * rows[first:end].mean(0)
    rows[ONES:GROUND] = rows[TENS:ONES] @ basis  # the same digits, turned into other directions
    rows[GROUND], rows[CENTRE] = basis[0], basis[1]
    rows[1:] *= LENGTH / rows[1:].norm(dim=1, keepdim=True)
    waves = place_waves(GRID)
    places = basis[2 : 2 + WAVES] * (LENGTH / waves.norm(dim=1).mean())
    return Table(rows, places)


def place_waves(grid: int) -> Tensor:
    """Smooth functions of the places of grid x grid patches, float32 [grid * grid, WAVES]."""
    u = (torch.arange(grid) + 0.5) / grid
    one = [2.5 * (2 * u - 1)]
    one += [f(k * torch.pi * u) for k in _FREQUENCIES for f in (torch.cos, torch.sin)]
    row = torch.stack(one, 1)
    x = row[None].expand(grid, grid, -1)
    return torch.cat([x, x.transpose(0, 1)], -1).reshape(grid * grid, -1)


def symbols_of(scene: Scene, owner: np.ndarray) -> np.ndarray:
    """Symbols uint8 [patches, 5] of patches that show the objects `owner` [grid, grid].

    Columns: color, shape, tens, ones, and ground or centre. The left half of a card shows the
    tens, the right half the ones, and the patch of its centre both.
    """
    grid = len(owner)
    made = np.zeros((grid, grid, 5), dtype=np.uint8)
    made[..., 4] = np.where(owner < 0, GROUND, NONE)
    middles = (np.arange(grid) + 0.5) * SIZE / grid
    for i, item in enumerate(scene.items):
        own = owner == i
        made[own, 0] = COLOR + list(COLORS).index(item.color)
        made[own, 1] = SHAPE + SHAPES.index(item.shape)
        row, column = item.y * grid // SIZE, item.x * grid // SIZE
        made[row, column, 4] = CENTRE
        if item.number is not None:
            tens, ones = item.number
            made[own & (middles < item.x), 2] = TENS + tens
            made[own & (middles >= item.x), 3] = ONES + ones
            made[row, column, 2:4] = TENS + tens, ONES + ones
    return made.reshape(grid * grid, 5)


def presence_of(scene: Scene) -> np.ndarray:
    """What is there, uint8 [PRESENT] of 0 and 1."""
    made = np.zeros(PRESENT, dtype=np.uint8)
    for item in scene.items:
        made[PAIRS.index((item.shape, item.color))] = 1
        if item.number is not None:
            tens, ones = item.number
            made[len(PAIRS) + tens] = made[len(PAIRS) + 10 + ones] = 1
    return made


def symbolic_scene(seed: int, grid: int, most: int) -> tuple[Scene, np.ndarray]:
    """An undrawn training scene of 2 to `most` objects on a coarse grid, and each patch's object.

    On 8 x 8 patches and more, an object may take two patches each way.
    """
    rng = np.random.default_rng([seed, grid, most, 7])
    pairs = choose_pairs(rng, int(rng.integers(2, most + 1)))
    cells = _cells(rng, len(pairs), grid)
    owner = np.full((grid, grid), -1)
    items = []
    for i, ((shape, color), (row, column)) in enumerate(zip(pairs, cells, strict=True)):
        x, y = (int((v + 0.5) * SIZE / grid) for v in (column, row))
        tens, every = np.flatnonzero(_digits()), len(_digits())
        digits = int(rng.choice(tens)), int(rng.integers(every))
        items.append(Item(shape, color, x, y, PATCH, 0, digits if shape == "card" else None))
        if grid >= 8:
            height, width = rng.integers(1, 3, 2)
            part = owner[row : row + height, column : column + width]
            part[part < 0] = i
    for i, (row, column) in enumerate(cells):
        owner[row, column] = i
    return Scene(seed, "train", tuple(items)), owner


def _digits() -> np.ndarray:
    from edgeprune.demo.scenes import load_digits

    return load_digits().labels


def _cells(rng: np.random.Generator, count: int, grid: int) -> list[tuple[int, int]]:
    """Distinct cells; on 8 x 8 patches and more, no two next to each other."""
    gap = 2 if grid >= 8 else 1
    chosen: list[tuple[int, int]] = []
    while len(chosen) < count:
        row, column = (int(v) for v in rng.integers(0, grid, 2))
        if all(max(abs(row - a), abs(column - b)) >= gap for a, b in chosen):
            chosen.append((row, column))
    return chosen
