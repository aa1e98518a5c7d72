"""Engines that two dialogues share, on every kind of cache, and questions for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from edgeprune.bundle import Bundle
from edgeprune.demo.questions import held_out
from edgeprune.runtime import Engine, Sampling, Sequence, Session, backends

NEXT = "how many circles are there ?"


SHORT = Sampling(max_new_tokens=3)


@dataclass(frozen=True)
class Setup:
    """A bundle and the backend that it runs on; every answer goes on to its last token."""

    bundle: Path
    backend: str

    def engine(self) -> Engine:
        opened = Bundle.open(self.bundle)
        manifest = replace(opened.manifest, text=replace(opened.manifest.text, eos_token_ids=()))
        opened = Bundle(opened.path, manifest)
        return Engine(opened, backends.make(opened, self.backend))

    def session(self) -> Session:
        """On an engine of its own."""
        return Session(self.engine())


SETUPS = [("in-place", "ort-cpu"), ("grow", "ort-cpu"), ("in-place", "trt"), ("grow", "trt-rtx")]


@cache
def questions() -> list[tuple[Image.Image, str]]:
    return [(image, question.text) for image, question in held_out(6)]


def steps(sequence: Sequence, question: tuple[Image.Image, str], count: int) -> Iterator[int]:
    """The tokens of an answer, one at a time, by greedy calls of a sequence."""
    engine, (image, text) = sequence.engine, question
    prefix_ids, text_ids = engine.prompter.first_turn(text)
    output = sequence.read(text_ids, prefix_ids, engine.encode_image(image))
    for _ in range(count):
        yield output.token
        output = sequence.read(np.array([[output.token]]), logits=False)


def greedy(sequence: Sequence, token: int, count: int) -> list[int]:
    found = []
    for _ in range(count):
        token = sequence.read(np.array([[token]]), logits=False).token
        found.append(token)
    return found
