"""What leaving out tiles costs, by how they are chosen.

    python -m benchmarks.tiles.measure --model out/tiles-model -o out/tiles

Each held-out scene is asked one question. A bundle for each number of tiles is exported once and
shown what four ways choose: `contrast`, which is that of `--tiles`; `random` and `first` tiles;
`things`, which knows the scene and takes those with the most in them. In all cases the view of the
whole is shown too; with 0 tiles it is all there is. Answers count where they equal the expected
one. Times are those of `edgeprune compare --tiles`, or of `edgeprune bench` on the same bundles.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.tiles.scenes import GRID, KINDS, SIDE, TILE, Thing, draw, make_scene, question
from benchmarks.tiles.write_questions import SPLIT
from edgeprune.intervals import difference, wilson
from edgeprune.making import make
from edgeprune.recipe import Recipe
from edgeprune.runtime import Session
from edgeprune.runtime.media import prepare
from edgeprune.spec import PruneSpec
from edgeprune.tile_choice import contrast
from edgeprune.tiling import Size, Tiling

ALL = GRID * GRID
WAYS = ("contrast", "random", "first", "things")
DETAIL = ("read", "find")
"""Kinds of questions that only tiles answer."""


@dataclass(frozen=True)
class Row:
    """Answers with so many tiles: a 1 for each that is right, by how tiles were chosen."""

    tiles: int
    visual_tokens: int
    operations: int  # of the encoder
    marks: dict[str, str]


def exported(model: str, folder: Path, tiles: int) -> Path:
    """The bundle for a number of tiles, 0 for the view of the whole alone, made where missing."""
    output = folder / f"tiles-{tiles}"
    if not (output / "manifest.json").is_file():
        side = SIDE if tiles else TILE
        recipe = Recipe(
            PruneSpec("none"),
            output,
            model,
            image_size=Size(side, side),
            tiles=tiles if 0 < tiles < ALL else None,
            parity=1,
        )
        make(recipe)
    return output


def orders(
    things: Sequence[Thing], pixels: NDArray[np.float32], tiling: Tiling, seed: int
) -> dict[str, NDArray[np.int64]]:
    """All tiles, those first that each way chooses first."""
    held = np.zeros(ALL)
    for thing in things:
        held[thing.top // TILE * GRID + thing.left // TILE] += 1
    return {
        "contrast": np.argsort(-contrast(pixels[:ALL], tiling.tokens), kind="stable"),
        "random": np.random.default_rng([seed, 8]).permutation(ALL),
        "first": np.arange(ALL),
        "things": np.argsort(-held, kind="stable"),
    }


def asked(bundle: Path, tiles: int, questions: int, ways: Sequence[str]) -> Row:
    """Every question, once for each way to choose."""
    whole = Tiling("stretch", GRID, GRID, SIDE, SIDE, TILE, 4, "last", (1.0,))
    with Session.open(bundle, threads=1) as session:
        sampling = replace(session.sampling, temperature=0.0, max_new_tokens=4)
        record, marks = session.manifest.image, dict.fromkeys(ways, "")
        every = replace(record, tiling=replace(record.tiling or whole, kept=None))
        for seed in range(questions):
            things = make_scene(seed, SPLIT)
            one = question(things, KINDS[seed % len(KINDS)], seed)
            image = draw(things, seed, SPLIT)
            pixels = prepare(image, every if tiles else record).pixels
            order = orders(things, pixels, whole, seed) if tiles else {}
            for way in ways:
                rows = [*sorted(order[way][:tiles]), ALL] if tiles else [0]
                shown = session.engine.encode_pixels(pixels[rows])
                answer = session.ask(shown, one.text, sampling)
                marks[way] += str(int(answer.text.strip() == one.answer))
        manifest = session.manifest
        return Row(tiles, manifest.prune.visual_tokens, manifest.encoder.operations, marks)


def table(rows: Sequence[Row], kinds: Sequence[str]) -> Iterator[str]:
    """A line per number of tiles, the most first, of the questions of some kinds."""
    rows = sorted(rows, key=lambda row: -row.tiles)
    among = [n for n in range(len(rows[0].marks["contrast"])) if KINDS[n % len(KINDS)] in kinds]
    base = _of(rows[0].marks["contrast"], among)
    yield f"{len(among):,} questions ({', '.join(kinds)}), right in percent"
    yield f"| tiles | encoder | visual tokens | {' | '.join(WAYS)} |"
    yield "| ---: | ---: | ---: | " + " | ".join(["---:"] * len(WAYS)) + " |"
    for row in rows:
        share = row.operations / rows[0].operations
        cells = (_cell(row.marks, way, among, base) for way in WAYS)
        yield f"| {row.tiles} | {share:.2f} | {row.visual_tokens} | {' | '.join(cells)} |"


def _of(marks: str, among: Sequence[int]) -> str:
    return "".join(marks[n] for n in among)


def _cell(marks: dict[str, str], way: str, among: Sequence[int], base: str) -> str:
    if way not in marks:
        return "-"
    own = _of(marks[way], among)
    low, high = wilson(own.count("1"), len(own))
    change, half = difference(own, base)
    told = f"{100 * own.count('1') / len(own):.1f} ± {50 * (high - low):.1f}"
    return told if own == base else f"{told} ({100 * change:+.1f} ± {100 * half:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy by tiles that are encoded.")
    parser.add_argument("--model", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=1200)
    parser.add_argument("--tiles", default="9,6,4,3,2,1,0")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    rows = list[Row]()
    for tiles in map(int, args.tiles.split(",")):
        bundle = exported(args.model, args.output, tiles)
        ways = WAYS if 0 < tiles < ALL else WAYS[:1]  # else there is nothing to choose
        rows.append(asked(bundle, tiles, args.questions, ways))
        print(tiles, {way: found.count("1") for way, found in rows[-1].marks.items()}, flush=True)
        told = {"questions": args.questions, "kinds": KINDS, "rows": [asdict(row) for row in rows]}
        (args.output / "tiles.json").write_text(json.dumps(told, indent=1) + "\n")
    for kinds in (KINDS, DETAIL):
        print("", *table(rows, kinds), sep="\n")


if __name__ == "__main__":
    main()
