"""Writes the demo's held-out questions into a folder: images, questions, a task of lmms-eval.

    python -m benchmarks.lmms_task.write out/task --questions 200
    python -m lmms_eval --model edgeprune --model_args bundle=out/demo-utp-cr4 \\
        --tasks edgeprune_scenes --include_path out/task --batch_size 1 --output_path out/lmms
    edgeprune compare --methods utp --cr 4 --questions-file out/task/questions.jsonl -o out/compare

Both ask the same questions and count an answer as right where it is the expected one to the letter,
so both report the same accuracy.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from edgeprune import demo

TASK = """\
task: edgeprune_scenes
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.images
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  max_new_tokens: 32
  temperature: 0
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def write(folder: Path, count: int) -> None:
    """The first `count` questions; a scene's image is written once."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    lines = []
    for image, question in demo.held_out(count):
        file = images / f"{question.image_id}.png"
        if not file.exists():
            image.save(file)
        lines.append(
            json.dumps(
                {
                    "image": f"images/{file.name}",
                    "kind": question.kind,
                    "question": question.text,
                    "answer": question.answer,
                }
            )
        )
    questions = folder / "questions.jsonl"
    questions.write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "edgeprune_scenes.yaml").write_text(
        TASK.format(questions=questions.resolve()), encoding="utf-8"
    )
    shutil.copy(Path(__file__).with_name("utils.py"), folder / "utils.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--questions", type=int, default=200)
    args = parser.parse_args()
    write(args.folder, args.questions)


if __name__ == "__main__":
    main()
