"""Training batches of the demo model: symbols of scenes, ideal visual tokens, dialogues."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.demo.build import BOS, EOS, PAD, WORDS
from edgeprune.demo.questions import KINDS, Question, ask, every_question
from edgeprune.demo.scenes import (
    COLORS,
    PLURALS,
    SHAPES,
    SIZE,
    Scene,
    Thing,
    choose_kinds,
    coverage,
    draw,
    make_scene,
    place,
)

ID = {word: i for i, word in enumerate(WORDS)}
TURNS = 8  # questions per dialogue
TEXT = 12 * TURNS  # text tokens per dialogue, padded
GROUND, CENTRE = len(WORDS), len(WORDS) + 1  # rows of the symbol table beyond the words
WAVES = 14  # smooth functions of a patch's place
WORD_NORM = 3.0  # length of a word's embedding; a patch's attributes have the same length
TAIL = {"color": 2, "shape": 3, "presence": 2, "count": 4, "relation": 2, "read": 3}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
PAIRS = [(s, c) for s in SHAPES for c in COLORS]
PRESENT = len(PAIRS) + 10  # what [CLS] is trained to know: pairs, then digits


def symbol_table(width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows [words + 2, width] for words, ground and centre; rows [WAVES, width] for places.

    All are orthogonal, except that a plural is close to its singular and padding is zero.
    """
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    table = basis[: len(WORDS) + 2] * WORD_NORM
    for singular, plural in PLURALS.items():
        table[ID[plural]] = 0.9 * table[ID[singular]] + 0.44 * table[ID[plural]]
    table[PAD] = 0
    return table, basis[len(WORDS) + 2 : len(WORDS) + 2 + WAVES]


def waves(grid: int) -> Tensor:
    """Smooth functions of the places of grid x grid patches, float32 [grid**2, WAVES]."""
    u = (torch.arange(grid) + 0.5) / grid
    one = [2.5 * (2 * u - 1)] + [
        f(k * torch.pi * u) for k in (1, 2, 4) for f in (torch.cos, torch.sin)
    ]
    row = torch.stack(one, 1)  # [grid, 7]
    x = row[None].expand(grid, grid, -1)
    return torch.cat([x, x.transpose(0, 1)], -1).reshape(grid * grid, -1)


@dataclass
class Symbols:
    """Batch of scenes: word ids int64 [batch, patches, 5] of each patch's color, shape, digit,
    ground and centre (PAD where it has none), and what is present float32 [batch, PRESENT]."""

    patches: Tensor
    present: Tensor


@dataclass
class Dialogues:
    """Token ids int64 [batch, TEXT], places and ids of supervised tokens, and their kinds.

    `rows`, `columns` (text position that predicts) and `answers` are int64 [n]; `kinds` is the
    index into KINDS, or -1 for the end-of-sequence token, or -2 for the words of a question from
    which on its answer is settled: asking for it there already shortens the way to learn.
    `named` int64 [m, 2] are row and column of words that name one thing (in a relation, or present
    with its color), and `where` float32 [m, 2] the things' places, -1 to 1 from left to right and
    from top to bottom.
    """

    ids: Tensor
    rows: Tensor
    columns: Tensor
    answers: Tensor
    kinds: Tensor
    named: Tensor
    where: Tensor


def symbolic_scene(rng: np.random.Generator, grid: int, most: int) -> tuple[Scene, np.ndarray]:
    """An undrawn scene of 2 to `most` things on a coarse grid, and each patch's thing [g, g]."""
    kinds = choose_kinds(rng, int(rng.integers(2, most + 1)))
    cells = place(rng, [False] * len(kinds), grid, 2 if grid >= 8 else 1)
    owner = np.full((grid, grid), -1)
    things = []
    for i, ((shape, color), (x, y)) in enumerate(zip(kinds, cells, strict=True)):
        digit = int(rng.integers(10)) if shape == "card" else None
        left, top = (int((v + 0.5) * SIZE / grid) for v in (x, y))
        things.append(Thing(shape, color, left, top, 32, 0, digit))
        if grid >= 8:
            a, b = rng.integers(1, 3, 2)
            part = owner[y : y + b, x : x + a]
            part[part < 0] = i
    for i, (x, y) in enumerate(cells):
        owner[y, x] = i
    return Scene(0, "train", tuple(things)), owner


def drawn_scene(seed: int, many_cards: bool = False) -> tuple[Scene, np.ndarray]:
    """A training scene, and each patch's thing [12, 12]."""
    cards = (0.1, 0.2, 0.25, 0.25, 0.2) if many_cards else (0.3, 0.35, 0.35)
    scene = make_scene(seed, "train", cards=cards)
    return scene, coverage(scene)


def symbols(scenes: list[Scene], owners: list[np.ndarray]) -> Symbols:
    """The symbols of scenes whose patches show the given things."""
    grid = len(owners[0])
    patches = np.full((len(scenes), grid * grid, 5), PAD)
    present = np.zeros((len(scenes), PRESENT), dtype=np.float32)
    for b, (scene, owner) in enumerate(zip(scenes, owners, strict=True)):
        rows = [[ID[t.color], ID[t.shape], PAD if t.digit is None else ID[str(t.digit)], PAD]
                for t in scene.things]  # fmt: skip
        rows.append([PAD, PAD, PAD, GROUND])
        patches[b, :, :4] = np.array(rows)[owner.reshape(-1)]
        for thing in scene.things:
            x, y = thing.x * grid // SIZE, thing.y * grid // SIZE
            patches[b, y * grid + x, 4] = CENTRE
            present[b, PAIRS.index((thing.shape, thing.color))] = 1
            if thing.digit is not None:
                present[b, len(PAIRS) + thing.digit] = 1
    return Symbols(torch.from_numpy(patches), torch.from_numpy(present))


def either(question: Question) -> Question:
    """A relation asked for its side ("left , right of") instead of yes or no.

    The answer then hangs on the two places alone and is learned sooner; training mixes both.
    """
    words = question.text.split()
    side = words[3]
    answer = side if question.answer == "yes" else OPPOSITE[side]
    words[3:4] = [side, ",", OPPOSITE[side]]
    return replace(question, text=" ".join(words), answer=answer)


def hard_presence(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Whether a pair is there, where its color is on two things or more; yes as often as no."""
    colors = [t.color for t in scene.things]
    found = [q for q in every_question(scene, "presence") if colors.count(q.text.split()[3]) > 1]
    sides = [[q for q in found if q.answer == answer] for answer in ("yes", "no")]
    side = sides[rng.integers(2)]
    return side[rng.integers(len(side))] if side else None


def dialogues(scenes: list[Scene], rng: np.random.Generator) -> Dialogues:
    """Eight questions and answers about each scene, laid out as the chat template does.

    The ids begin after the image tokens: "<s> user: <image>*n" comes before them.
    """
    ids = np.full((len(scenes), TEXT), PAD)
    places: list[tuple[int, int, int, int]] = []
    named: list[tuple[int, int]] = []
    where: list[tuple[float, float]] = []
    for b, scene in enumerate(scenes):
        line: list[int] = []
        spots: dict[Any, tuple[float, float]] = {}
        for t in scene.things:
            spots[t.shape] = spots[t.shape, t.color] = (2 * t.x / SIZE - 1, 2 * t.y / SIZE - 1)
        for turn, question in enumerate(ask(scene, rng, TURNS, (*KINDS, "relation", "presence"))):
            if question.kind == "relation" and rng.random() < 0.5:
                question = either(question)
            if question.kind == "presence" and rng.random() < 0.5:
                question = hard_presence(scene, rng) or question
            if len(line) + len(question.text.split()) + 4 > TEXT:
                break
            words = [ID[w] for w in question.text.split()]
            line += ([] if turn == 0 else [ID["user:"]]) + words + [ID["assistant:"]]
            settled = len(line) - 3  # the last noun
            if question.kind == "relation":
                named += [(b, len(line) - len(words) + 1), (b, settled)]
                where += [spots[WORDS[line[column]]] for _, column in named[-2:]]
            pair = (WORDS[line[settled]], WORDS[line[settled - 1]])
            if question.kind == "presence" and pair in spots:
                named.append((b, settled))
                where.append(spots[pair])
            answer = ID[question.answer]
            places.append((b, len(line) - 1, answer, KINDS.index(question.kind)))
            places.append((b, len(line), EOS, -1))
            for back in range(1, TAIL[question.kind] + 1):
                places.append((b, len(line) - 1 - back, answer, -2))
            line += [answer, EOS]
        ids[b, : len(line)] = line
    table = torch.tensor(places)
    pairs = torch.tensor(named, dtype=torch.int64).view(-1, 2)
    spot = torch.tensor(where, dtype=torch.float32).view(-1, 2)
    rows, columns, answers, kinds = table.unbind(1)
    return Dialogues(torch.from_numpy(ids), rows, columns, answers, kinds, pairs, spot)


def prefix() -> Tensor:
    """Ids of what comes before the image tokens."""
    return torch.tensor([BOS, ID["user:"]])


def pixels(scenes: list[Scene]) -> Tensor:
    """Normalised pixels float32 [batch, 3, 168, 168], as the processor gives them."""
    raw = np.stack([np.asarray(draw(scene)) for scene in scenes])
    return (torch.from_numpy(raw).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
