"""Prompts and stop texts of every sort of letter."""

from __future__ import annotations

from pathlib import Path
from random import Random

from tests.fuzz.case import Case, command
from tests.fuzz.mutate import STRINGS
from tests.fuzz.seeds import QUESTION, Seeds

WEIGHT = 3

PIECES = (
    *STRINGS,
    QUESTION,
    "<image>",
    "<s>",
    "</s>",
    "<unk>",
    "USER:",
    "ASSISTANT:",
    "<|im_start|>",
    "\r",
    "\t",
    "\x00",
    "\x7f",
    "\u2028",
    "\ufeff",
    "\udcff",
    "\u0338" * 500,
    "{{ 7 * 7 }}",
    "{% for %}",
    "a" * 5000,
    "\U00020000" * 50,
    "--image",
    "-1",
)


def make(rng: Random, seeds: Seeds, folder: Path) -> Case:
    def text() -> str:
        return "".join(rng.choice(PIECES) for _ in range(rng.choice([0, 1, 1, 2, 5])))

    options: list[object] = [f"--prompt={text()}"]
    if rng.random() < 0.3:
        options.append(f"--prompt={text()}")
    if rng.random() < 0.3:
        options.append(f"--stop={text()}")
    run = command(
        *("run", seeds.bundle, "--image", seeds.image, *options),
        *("--max-new-tokens", 3, "--threads", 1, *rng.choice([(), ("--json",)])),
    )
    return Case(run, " ".join(map(str, options))[:80].encode("ascii", "replace").decode(), True)
