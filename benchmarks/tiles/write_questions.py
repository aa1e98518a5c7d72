"""Held-out scenes and one question about each, for `edgeprune compare`.

    python -m benchmarks.tiles.write_questions FOLDER --questions 1200
    edgeprune compare --model out/tiles-model --image-size 168x168 --methods none \
        --tiles all,6,4,3,2,1 --questions-file FOLDER/questions.jsonl -o out/compare-tiles

The first command needs neither torch nor transformers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from benchmarks.tiles.scenes import KINDS, Question, draw, make_scene, question

SPLIT = "held_out"


def held_out(count: int, split: str = SPLIT) -> Iterator[tuple[Image.Image, Question]]:
    """Scenes of a split, each with one question, of all kinds in turn."""
    for seed in range(count):
        things = make_scene(seed, split)
        yield draw(things, seed, split), question(things, KINDS[seed % len(KINDS)], seed)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write held-out scenes and questions.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--questions", type=int, default=1200)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    lines = list[str]()
    for number, (image, asked) in enumerate(held_out(args.questions)):
        image.save(args.folder / (name := f"scene-{number}.png"))
        record = {"image": name, "question": asked.text, "answer": asked.answer, "kind": asked.kind}
        lines.append(json.dumps(record))
    (args.folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    print(args.folder / "questions.jsonl")


if __name__ == "__main__":
    main()
