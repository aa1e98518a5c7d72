"""What is trained on and asked: image, question and answer, as a bundle would have them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from edgeprune.demo import draw, make_scene
from edgeprune.demo.questions import benchmark, questions
from edgeprune.export.exporter import read_records
from edgeprune.export.prompts import save_tokenizer
from edgeprune.images import image_in, read_image
from edgeprune.models import Adapter
from edgeprune.models._processor import Processor, Prompt
from edgeprune.runtime.media import prepare
from edgeprune.runtime.text import Prompter


@dataclass(frozen=True)
class Example:
    image: Image
    question: str
    answer: str


@dataclass(frozen=True)
class Encoded:
    """An example as tensors."""

    prompt: Prompt
    answer: Tensor  # int64 [n], the last one ends it


class Encoder:
    """Writes examples as the runtime does: template, tokens and pixels are those of a bundle."""

    def __init__(self, adapter: Adapter) -> None:
        processor = Processor(adapter)
        records = read_records(adapter, processor)
        with tempfile.TemporaryDirectory() as folder:
            save_tokenizer(processor, file := Path(folder) / "tokenizer.json")
            self._prompter = Prompter(file, records.text)
        self._image, self.ends = records.image, records.text.eos_token_ids

    def __call__(self, example: Example) -> Encoded:
        prefix, text = map(torch.from_numpy, self._prompter.first_turn(example.question))
        answer = self._prompter.answer(example.answer)[0].tolist()
        shown = [example.image] * (self._image.frames or self._image.images)
        pixels = torch.from_numpy(prepare(shown, self._image).pixels)
        return Encoded(Prompt(pixels, prefix, text), torch.tensor([*answer, self.ends[0]]))

    def text(self, ids: list[int]) -> str:
        """An answer without what ends it."""
        return self._prompter.decode(i for i in ids if i not in self.ends).strip()


def demo_examples(first: int) -> Iterator[Example]:
    """One question about each scene of the demo's training split, from a seed on, without end."""
    while True:
        (question,) = questions(first, "train", 1)
        image = draw(make_scene(first, "train"))
        yield Example(image, question.text, question.answer)
        first += 1


def file_examples(file: Path, folder: Path, first: int) -> Iterator[Example]:
    """Question and answer of each record with an image of a LLaVA-Instruct file, over and over."""
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines() if file.suffix == ".jsonl" else []
    records = [json.loads(line) for line in lines if line.strip()] if lines else json.loads(text)
    records = [record for record in records if "image" in record]
    while True:
        record = records[first % len(records)]
        human, model = (turn["value"] for turn in record["conversations"][:2])
        image = read_image(image_in(folder, record["image"])).image
        yield Example(image, human.replace("<image>", "").strip(), model.strip())
        first += 1


def held_out(count: int) -> Iterator[Example]:
    """Questions of the demo's benchmark, which nothing is trained on."""
    for question in benchmark(count, "held_out"):
        image = draw(make_scene(question.image_id, question.split))
        yield Example(image, question.text, question.answer)
