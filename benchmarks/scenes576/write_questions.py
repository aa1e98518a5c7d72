"""Write test questions for `edgeprune compare`, and calibration samples for `edgeprune export`.

    python -m benchmarks.scenes576.write_questions FOLDER --questions 800 --samples 64

FOLDER then holds questions.jsonl (image, question, answer, kind: `--questions-file`), samples.json
in LLaVA-Instruct's form with expected answers (`--samples-file`), and the images of both, for
`--questions-image-dir` and `--image-dir`. Each question is about a scene of its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks.scenes576.questions import Question, benchmark
from benchmarks.scenes576.scenes import SPLITS, draw, make_scene


def write(folder: Path, questions: int, samples: int, split: str = "test") -> None:
    """Write both files and all images into `folder`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = [
        {"image": name, "question": q.text, "answer": q.answer, "kind": q.kind}
        for name, q in _with_images(folder, questions, split)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "questions.jsonl").write_text(text)
    records = []
    for name, q in _with_images(folder, samples, "calibration"):
        turns = [
            {"from": "human", "value": f"<image>\n{q.text}"},
            {"from": "gpt", "value": q.answer},
        ]
        records.append({"id": name, "image": name, "conversations": turns})
    (folder / "samples.json").write_text(json.dumps(records, indent=1))


def _with_images(folder: Path, count: int, split: str) -> Iterator[tuple[str, Question]]:
    """Questions with the names of their images, which are written."""
    for question in benchmark(count, split):
        name = f"{split}-{question.seed}.png"
        draw(make_scene(question.seed, split)).save(folder / "images" / name)
        yield name, question


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--questions", type=int, default=800)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--split", default="test", choices=SPLITS)
    args = parser.parse_args()
    write(args.folder, args.questions, args.samples, args.split)


if __name__ == "__main__":
    main()
