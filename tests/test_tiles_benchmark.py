"""Scenes and ideal tokens of `benchmarks/tiles`: every question has one answer, in one tile."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch

from benchmarks.demo.build import WORDS
from benchmarks.tiles import symbols
from benchmarks.tiles.measure import ALL, Row, orders, table
from benchmarks.tiles.scenes import GRID, KINDS, TILE, draw, every_question, make_scene, question
from edgeprune.tiling import Tiling

SCENES = [make_scene(seed, "validation") for seed in range(60)]


def test_a_thing_is_in_one_tile_and_has_a_color_of_its_own() -> None:
    for things in SCENES:
        assert 3 <= len(things) <= 6
        assert len({thing.color for thing in things}) == len(things)
        for thing in things:
            for start in (thing.left, thing.top):
                assert start // TILE == (start + thing.size - 1) // TILE


def test_every_question_has_one_answer_and_known_words() -> None:
    for seed, things in enumerate(SCENES):
        every = every_question(things)
        assert max(Counter(one.text for one in every).values()) == 1
        assert {one.kind for one in every} == set(KINDS)
        words = {word for one in every for word in (*one.text.split(), one.answer)}
        assert words <= set(WORDS)
        assert question(things, "read", seed).answer.isdigit()


def test_ideal_tokens_show_a_digit_in_tiles_alone() -> None:
    for things in SCENES:
        shown = symbols.symbols(things)
        assert shown.shape == (16 * (ALL + 1), 3)
        digits = {symbols.ID[str(t.digit)] for t in things if t.digit is not None}
        assert {int(i) for i in shown[: 16 * ALL, 2]} - {0} == digits
        assert not shown[16 * ALL :, 2].any()
        of_whole = {int(i) for i in shown[16 * ALL :, 0]} - {symbols.GROUND}
        assert of_whole == {symbols.ID[t.color] for t in things}


def test_what_knows_the_scene_chooses_its_tiles_first() -> None:
    things = SCENES[0]
    pixels = symbols.pixels(draw(things, 0, "validation")).numpy()
    tiling = Tiling("stretch", GRID, GRID, 168, 168, TILE, 4, "last", (1.0,))
    found = orders(things, pixels, tiling, 0)
    held = {t.top // TILE * GRID + t.left // TILE for t in things}
    assert {int(tile) for tile in found["things"][: len(held)]} == held
    assert all(sorted(order) == list(range(ALL)) for order in found.values())


def test_dialogues_ask_what_is_answered() -> None:
    talk = symbols.dialogues(SCENES[:8], np.random.default_rng(0))
    ends = talk.ids[talk.rows, talk.columns] == symbols.ID["assistant:"]
    assert torch.equal(ends, talk.kinds >= 0)


def test_the_table_tells_the_change_by_question() -> None:
    rows = [Row(9, 160, 100, {"contrast": "1111"}), Row(1, 32, 20, {"contrast": "1011"})]
    lines = list(table(rows, KINDS))
    assert lines[-1].startswith("| 1 | 0.20 | 32 | 75.0 ± ") and "(-25.0 ± " in lines[-1]
