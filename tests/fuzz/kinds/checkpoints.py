"""Checkpoints whose settings, or what a file of weights says of itself, are altered by type."""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from functools import cache
from pathlib import Path
from random import Random

from tests.fuzz.case import Case, command
from tests.fuzz.mutate import alter, parses
from tests.fuzz.seeds import Seeds

WEIGHT = 10

SETTINGS = (
    *("config.json", "config.json", "config.json", "preprocessor_config.json"),
    *("processor_config.json", "generation_config.json"),
)


def make(rng: Random, seeds: Seeds, folder: Path) -> Case:
    seed = rng.choice(seeds.checkpoints)
    _load(seed)  # slow the first time
    (checkpoint := folder / "checkpoint").mkdir()
    for file in seed.iterdir():
        (checkpoint / file.name).symlink_to(file)
    weights = rng.choice(sorted(file.name for file in seed.glob("*.safetensors")))
    altered = checkpoint / rng.choice([*(n for n in SETTINGS if (seed / n).is_file()), weights])
    content = altered.read_bytes()
    altered.unlink()
    if altered.name == weights:
        content, note, whole = _header(content, rng)
        altered.write_bytes(content)
    else:
        text, note = alter(json.loads(content), rng)
        whole = parses(text)
        altered.write_text(text)
    note = f"{seed.name}/{altered.name}: {note}"
    return Case(command("models", "--model", checkpoint), note, whole)


def _header(content: bytes, rng: Random) -> tuple[bytes, str, bool]:
    """Another header of a safetensors file, the tensors as they were."""
    (size,) = struct.unpack_from("<Q", content)
    text, note = alter(json.loads(content[8 : 8 + size]), rng)
    header = text.encode()
    return struct.pack("<Q", len(header)) + header + content[8 + size :], note, parses(text)


@cache
def _load(checkpoint: Path) -> None:
    from edgeprune.errors import ModelError
    from edgeprune.models import open_model

    with suppress(ModelError):  # of some the default size has more tokens than positions
        open_model(str(checkpoint))
