"""Calibration samples: generated scenes for the demo model, or a user's own in LLaVA-Instruct form.

A user's file is JSON (a list) or JSONL, each record with `image` (a path within the image folder)
and `conversations` whose first human turn holds the question; `id` is optional, and so is an answer
in a turn of `gpt`. Records without an image are passed over.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from edgeprune.errors import InputError, SpecError
from edgeprune.images import image_in, read_image
from edgeprune.models._processor import Processor, Prompt


@dataclass(frozen=True)
class Sample:
    """A prompt and the name under which it stands in a schedule's record."""

    id: str
    prompt: Prompt
    answer: str = ""  # empty: not known


def demo_samples(processor: Processor, count: int) -> Iterator[Sample]:
    """Generated scenes with a question each, from seeds that no benchmark uses."""
    from edgeprune.demo.questions import calibration_samples

    for image, question in calibration_samples(count):
        name = f"demo/{question.image_id}/{question.kind}"
        yield Sample(name, processor(image, question.text), question.answer)


def check_image_dir(image_dir: Path | None, file: Path | None) -> None:
    """SpecError for a folder of images without the file that names them."""
    if image_dir is not None and file is None:
        raise SpecError("--image-dir is the folder of images of --samples-file; give that too")


def user_samples(processor: Processor, file: Path, images: Path, count: int) -> Iterator[Sample]:
    """The first `count` records with an image of a LLaVA-Instruct file."""
    for number, record in islice(_with_image(_records(file)), count):
        name, question = _question(file, number, record)
        try:
            image = read_image(image_in(images, record["image"])).image
        except InputError as error:
            raise InputError(f"record {number} of {file}: {error}") from error
        prompt = processor(image, question)
        yield Sample(str(record.get("id", name)), prompt, _answer(record["conversations"]))


def answered(sample: Sample, processor: Processor, tokens: int) -> Prompt:
    """A sample's prompt with the first tokens of its answer behind the question, all but the last:
    behind each of the last `tokens` of the text one of the answer follows."""
    ids = processor.tokenizer(sample.answer, add_special_tokens=False)["input_ids"][: tokens - 1]
    answer = torch.tensor([ids], dtype=torch.int64)
    return replace(sample.prompt, text_ids=torch.cat([sample.prompt.text_ids, answer], dim=1))


def _with_image(records: list[Any]) -> Iterator[tuple[int, Any]]:
    """Records and their numbers; what is no record at all is left for the error that names it."""
    for number, record in enumerate(records):
        if not isinstance(record, dict) or "image" in record:
            yield number, record


def _records(file: Path) -> list[Any]:
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            records = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} is no readable JSON or JSONL ({error})") from error
    if not isinstance(records, list) or not any(True for _ in _with_image(records)):
        raise InputError(f"{file} holds no samples with an image; want LLaVA-Instruct records")
    return records


def _question(file: Path, number: int, record: Any) -> tuple[str, str]:
    try:
        turns = record["conversations"]
        question = next(t["value"] for t in turns if t["from"] in ("human", "user"))
        question = question.replace("<image>", "").strip()
        image = record["image"]
    except (KeyError, TypeError, AttributeError, StopIteration) as error:
        raise InputError(
            f"record {number} of {file} lacks `image` or a human turn's text in `conversations`"
        ) from error
    return f"{image}#{number}", question


def _answer(turns: list[Any]) -> str:
    """What the model is said to answer to the first question; empty where that is not text."""
    found = (t.get("value") for t in turns if t.get("from") in ("gpt", "assistant"))
    text = next(found, "")
    return text.strip() if isinstance(text, str) else ""
