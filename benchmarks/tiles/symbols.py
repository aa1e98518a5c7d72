"""What is trained on: ideal visual tokens, the pixels that should give them, and dialogues."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from benchmarks.demo.build import BOS, EOS, PAD, WORDS
from benchmarks.tiles.model import END, MEAN, START, STD, WIDTH
from benchmarks.tiles.scenes import (
    GRID,
    KINDS,
    PLAIN,
    SIDE,
    TILE,
    Thing,
    coverage,
    draw,
    every_question,
    make_scene,
)
from edgeprune.demo.scenes import COLORS

ID = {word: number for number, word in enumerate(WORDS)}
GROUND = len(WORDS)  # row of the table beyond the words
NORM = 3.0  # of a word's embedding
TURNS = 6
TEXT = 13 * TURNS
GRIDS = ((1, 2), (2, 1), (2, 2), (2, 3), (3, 2), (3, 3))
"""Rows and columns of tiles of images of other sizes, which the decoder learns to read too."""
NONE = (PAD, PAD, PAD)


def symbol_table(seed: int = 0) -> Tensor:
    """Orthogonal rows [words + 1, WIDTH] of words and bare ground; that of padding is zero."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0]
    table = basis[: GROUND + 1] * NORM
    table[PAD] = 0
    return table


@dataclass
class Dialogues:
    """Ids int64 [scenes, TEXT] after the image; rows, columns, answers and kinds int64 [n] of the
    tokens that are learned: kind -1 is the end of an answer, -2 a word of the question from which
    on the answer is settled."""

    ids: Tensor
    rows: Tensor
    columns: Tensor
    answers: Tensor
    kinds: Tensor


def attributes(thing: Thing, *, digit: bool) -> tuple[int, int, int]:
    read = PAD if thing.digit is None or not digit else ID[str(thing.digit)]
    return ID[thing.color], ID[thing.shape], read


def symbols(things: tuple[Thing, ...]) -> NDArray[np.int64]:
    """Word ids of what each visual token shows, tile after tile, the overview last: [160, 3]."""
    own = np.array([attributes(t, digit=True) for t in things] + [(GROUND, PAD, PAD)])
    return np.concatenate([own[in_tiles(coverage(things), GRID, GRID)], _overview(things)])


def in_tiles(raster: NDArray[np.int64], rows: int, columns: int) -> NDArray[np.int64]:
    """A raster of tokens, tile after tile: [4 rows, 4 columns] -> [tokens]."""
    return raster.reshape(rows, 4, columns, 4).swapaxes(1, 2).reshape(-1)


def _overview(things: tuple[Thing, ...]) -> NDArray[np.int64]:
    found = np.tile(np.array([GROUND, PAD, PAD]), (16, 1))
    for thing in things:
        found[thing.slot] = attributes(thing, digit=False)
    return found


def symbolic_scene(
    rng: np.random.Generator, rows: int, columns: int
) -> tuple[tuple[Thing, ...], NDArray[np.int64]]:
    """Things of an undrawn scene of any grid, and its symbols: [16 (tiles + 1), 3]."""
    things = make_scene(int(rng.integers(1 << 40)), "train")[: rows * columns]
    while True:
        owner = np.full((4 * rows, 4 * columns), -1)
        slots = list[int]()
        for number, _ in enumerate(things):
            height, width = rng.integers(2, 4, 2)
            row, column = rng.integers(rows), rng.integers(columns)
            top = 4 * row + rng.integers(0, 5 - height)
            left = 4 * column + rng.integers(0, 5 - width)
            part = owner[top : top + height, left : left + width]
            if (part >= 0).any():
                break
            part[:] = number
            middle = (2 * top + height) // (2 * rows), (2 * left + width) // (2 * columns)
            slots.append(int(4 * middle[0] + middle[1]))
        if len(slots) == len(things) == len({*slots}):
            break
    own = np.array([attributes(t, digit=True) for t in things] + [(GROUND, PAD, PAD)])
    moved = tuple(
        Thing(t.shape, t.color, 0, 0, 0, slot, t.digit)
        for t, slot in zip(things, slots, strict=True)
    )
    return moved, np.concatenate([own[in_tiles(owner, rows, columns)], _overview(moved)])


def pixels(image: Image.Image) -> Tensor:
    """Tiles row by row and the overview, as the processor makes them: [10, 3, TILE, TILE]."""
    overview = image.resize((TILE, TILE), Image.Resampling.BICUBIC)
    levels = np.asarray(image).reshape(GRID, TILE, GRID, TILE, 3).swapaxes(1, 2)
    every = np.concatenate([levels.reshape(-1, TILE, TILE, 3), np.asarray(overview)[None]])
    return (torch.from_numpy(every).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


def drawn(seed: int, *, crowded: bool) -> tuple[tuple[Thing, ...], Tensor, NDArray[np.int64]]:
    """A training scene, its pixels and symbols; `crowded` with something nearly everywhere."""
    things = make_scene(seed, "train", *((9, 5) if crowded else (None, None)))
    return things, pixels(draw(things, seed, "train")), symbols(things)


def dialogues(scenes: list[tuple[Thing, ...]], rng: np.random.Generator) -> Dialogues:
    """Questions and answers about each scene, none twice, as the chat template writes them."""
    ids = np.full((len(scenes), TEXT), PAD)
    learned = list[tuple[int, int, int, int]]()
    for row, things in enumerate(scenes):
        every, line = every_question(things), list[int]()
        for turn, which in enumerate(rng.permutation(len(every))[:TURNS]):
            one = every[which]
            line += [ID["user:"]] * (turn > 0) + [ID[word] for word in one.text.split()]
            line.append(ID["assistant:"])
            answer = ID[one.answer]
            learned.append((row, len(line) - 1, answer, KINDS.index(one.kind)))
            learned.append((row, len(line), EOS, -1))
            learned += [(row, len(line) - 1 - back, answer, -2) for back in (1, 2)]
            line += [answer, EOS]
        ids[row, : len(line)] = line
    rows, columns, answers, kinds = torch.tensor(learned).unbind(1)
    return Dialogues(torch.from_numpy(ids), rows, columns, answers, kinds)


def around() -> tuple[Tensor, Tensor]:
    """Ids before and after the visual tokens."""
    return torch.tensor([BOS, ID["user:"], START]), torch.tensor([END])


def classes() -> dict[str, Tensor]:
    """Ids of the words of each attribute, in the order of the symbols' columns."""
    groups = (tuple(COLORS), (*PLAIN, "card"), tuple("0123456789"))
    names = ("color", "shape", "digit")
    return {n: torch.tensor([ID[w] for w in g]) for n, g in zip(names, groups, strict=True)}


assert SIDE == GRID * TILE
