"""Accuracy of a demo checkpoint on drawn scenes, with transformers alone.

    python -m benchmarks.demo.evaluate [--model FOLDER] [--questions 2040] [--split held_out]

Every question is put to `LlavaForConditionalGeneration.generate` in the wording of the chat
template; greedy words up to </s> have to equal the answer exactly.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from edgeprune.demo import KINDS, MODEL_DIR, Question, draw, make_scene
from edgeprune.demo.questions import benchmark


class Answerer:
    """A checkpoint that answers questions about drawn scenes."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
        self.processor = AutoProcessor.from_pretrained(folder)

    def prompt(self, question: str) -> str:
        """The text of a first turn about one image."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        message = [{"role": "user", "content": content}]
        return str(self.processor.apply_chat_template(message, add_generation_prompt=True))

    @torch.inference_mode()
    def __call__(self, questions: list[Question]) -> list[str]:
        """Greedy answers, in one batch."""
        images = [draw(make_scene(q.image_id, q.split)) for q in questions]
        texts = [self.prompt(q.text) for q in questions]
        inputs = self.processor(images=images, text=texts, padding=True, return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        output = self.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        fresh = output[:, inputs["input_ids"].shape[1] :]
        answers = self.processor.batch_decode(fresh, skip_special_tokens=False)
        return [answer.split("</s>")[0].strip() for answer in answers]


def accuracy(
    answerer: Answerer, questions: list[Question], batch: int = 60
) -> dict[str, tuple[int, int]]:
    """Right answers and questions, by kind."""
    right: defaultdict[str, int] = defaultdict(int)
    asked: defaultdict[str, int] = defaultdict(int)
    for i in range(0, len(questions), batch):
        part = questions[i : i + batch]
        for question, answer in zip(part, answerer(part), strict=True):
            asked[question.kind] += 1
            right[question.kind] += answer == question.answer
    return {kind: (right[kind], asked[kind]) for kind in KINDS if asked[kind]}


def main() -> None:
    """Command line: a table, one row per kind."""
    parser = argparse.ArgumentParser(description="Accuracy of a demo checkpoint.")
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--questions", type=int, default=2040)
    parser.add_argument("--split", default="held_out")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    began = time.perf_counter()
    answerer = Answerer(args.model, getattr(torch, args.dtype))
    scores = accuracy(answerer, list(benchmark(args.questions, args.split)))
    print("| kind | right | questions | accuracy |\n| --- | ---: | ---: | ---: |")
    total = sum(r for r, _ in scores.values()), sum(n for _, n in scores.values())
    for kind, (right, asked) in [*scores.items(), ("all", total)]:
        print(f"| {kind} | {right} | {asked} | {right / asked:.1%} |")
    print(f"{time.perf_counter() - began:.0f} s, {args.dtype}, split {args.split}")


if __name__ == "__main__":
    main()
