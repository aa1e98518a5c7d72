"""Numbers and paths on the command line."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from random import Random

from tests.fuzz.case import Case, command
from tests.fuzz.seeds import QUESTION, Seeds

WEIGHT = 4

NUMBERS = (
    "-1",
    "0",
    "1",
    "2",
    "0.5",
    "1e3",
    "nan",
    "inf",
    "-inf",
    "1e999",
    "9" * 11,
    "9" * 20,
    "9" * 5000,
    "1000",
    "0x10",
    "\u0661",
    "1_000",
    "",
    " 1 ",
    "--",
    "2147483648",
    "4294967296",
    "-9223372036854775809",
)
SIZES = (
    "0x0",
    "1x1",
    "56x56",
    "99999999x1",
    "9" * 30 + "x9",
    "-1x5",
    "x",
    "5x",
    "1e3x1e3",
    "28x28x28",
)
SAMPLED = ("--max-new-tokens", "--temperature", "--top-k", "--top-p", "--seed", "--threads", "--cr")
PATHS = (
    "",
    ".",
    "/dev/null",
    "/dev/zero",
    "nosuch",
    "a\0b",
    "x" * 5000,
    "\udcff\udcfe",
    "/proc/self/mem",
)


def make(rng: Random, seeds: Seeds, folder: Path) -> Case:
    import_module("edgeprune.making")  # PyTorch takes seconds
    way, words = rng.choice(WAYS)(rng, seeds)
    return Case(command(*words), f"{way}: {' '.join(map(str, words))[-90:]!r}", True)


def run(rng: Random, seeds: Seeds) -> tuple[str, list[object]]:
    bundle = rng.choice(seeds.bundles)
    words: list[object] = ["run", bundle, "--image", seeds.image, "--prompt", QUESTION]
    for option in rng.sample(SAMPLED, rng.choice([1, 1, 2])):
        words.append(f"{option}={rng.choice(NUMBERS)}")
    return "run", words


def bench(rng: Random, seeds: Seeds) -> tuple[str, list[object]]:
    option = rng.choice(["--rounds", "--warmup", "--threads", "--text", "--new-tokens"])
    return "bench", [
        "bench",
        seeds.bundle,
        f"{option}={rng.choice(['-1', '0', 'nan', '9' * 30, ''])}",
    ]


def listing(rng: Random, seeds: Seeds) -> tuple[str, list[object]]:
    name = rng.choice(["models", "methods", "check"])
    option = rng.choice(["--image-size", "--num-images", "--frames", "--cr"])
    value = rng.choice(SIZES if option == "--image-size" else NUMBERS)
    memory = ["--memory"] if name == "check" else []
    return name, [name, *memory, "--model", seeds.checkpoint, f"{option}={value}"]


def plan(rng: Random, seeds: Seeds) -> tuple[str, list[object]]:
    """An export that a number stops, or else its missing schedule."""
    option = rng.choice(
        ["--cr", "--samples", "--seed", "--max-sites", "--num-images", "--parity", "--set"]
    )
    value = rng.choice(NUMBERS)
    if option == "--set":
        value = rng.choice(["K", "agnostic_layers", "nosuch", ""]) + "=" + value
    words = [
        "export",
        "--model",
        seeds.checkpoint,
        "--schedule",
        "nosuch.json",
        f"{option}={value}",
    ]
    return "export", words


def paths(rng: Random, seeds: Seeds) -> tuple[str, list[object]]:
    path = rng.choice(PATHS)
    ask = ["--prompt", QUESTION]
    return "path", rng.choice(
        [
            ["run", path, "--image", seeds.image, *ask],
            ["run", seeds.bundle, "--image", path, *ask],
            ["run", seeds.video_bundle, "--video", path, *ask],
            ["show", seeds.bundle, "--image", seeds.image, *ask, "-o", path],
            ["check", path],
            ["models", "--model", path],
            ["export", "--model", seeds.checkpoint, "--schedule", path],
            ["export", "--model", seeds.checkpoint, "--samples-file", path],
            ["export", "--model", seeds.checkpoint, "--schedule", "nosuch.json", "-o", path],
        ]
    )


def made(rng: Random, seeds: Seeds) -> tuple[str, list[object]]:
    """A path whose name is no UTF-8, of a file that is there."""
    path = os.fsdecode(b"caf\xe9.png")
    Path(path).write_bytes(seeds.image.read_bytes())
    return "named", [
        "run",
        seeds.bundle,
        "--image",
        path,
        "--prompt",
        QUESTION,
        "--max-new-tokens=1",
    ]


WAYS = (run, run, bench, listing, plan, paths, paths, made)
