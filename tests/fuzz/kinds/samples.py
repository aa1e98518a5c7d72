"""Files of calibration samples and of questions, and the images that they name."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.case import Case, reader
from tests.fuzz.kinds import images
from tests.fuzz.kinds.schedules import _adapter
from tests.fuzz.mutate import alter, parses
from tests.fuzz.seeds import QUESTION, Seeds

WEIGHT = 7


def make(rng: Random, seeds: Seeds, folder: Path) -> Case:
    _processor(seeds.checkpoint)  # slow the first time
    (own := folder / "images").mkdir()
    (own / "good.png").write_bytes(seeds.image.read_bytes())
    name, note, refuse = _image(rng, seeds, own)
    asking = rng.random() < 0.35
    records = [_question(name), _question("good.png")] if asking else [_turns(name)] * 2
    if rng.random() < 0.5 and not refuse:
        text, altered = alter(records, rng)
        note = f"{note}; {altered}"
    else:
        text = json.dumps(records)
    file = folder / rng.choice(["samples.json", "samples.jsonl"])
    if asking or file.suffix == ".jsonl":
        text = text.removeprefix("[").removesuffix("]").replace("}, {", "}\n{")
    file.write_text(text)
    read = (lambda: _ask(file, own)) if asking else (lambda: _calibrate(file, own, seeds))
    well_formed = all(parses(line) for line in text.splitlines())
    return Case(reader(read), note, well_formed, refuse, (seeds.outside,))


def _image(rng: Random, seeds: Seeds, folder: Path) -> tuple[Any, str, bool]:
    """What a record names, in words, and whether reading it would be wrong."""
    way = rng.choice(
        ["altered", "altered", "outside", "absolute", "pipe", "folder", "good", "name"]
    )
    if way == "outside":
        return os.path.relpath(seeds.outside, folder), way, True
    if way == "absolute":
        return str(seeds.outside), way, True
    if way == "pipe":
        os.mkfifo(folder / "pipe.png")
        return "pipe.png", way, True
    if way == "folder":
        return ".", way, True
    if way == "name":
        return rng.choice(["a\0b", "", 7, None, ["good.png"], "x" * 5000, "\ud800.png"]), way, True
    if way == "altered":
        content, note = images.altered(rng, seeds)
        (folder / "altered.png").write_bytes(content)
        return "altered.png", note, note in images.FOREIGN
    return "good.png", way, False


def _question(name: object) -> dict[str, object]:
    return {"image": name, "question": QUESTION, "answer": ["red", "blue"], "kind": "color"}


def _turns(name: object) -> dict[str, object]:
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": "red"}]
    return {"id": "a", "image": name, "conversations": turns}


def _calibrate(file: Path, folder: Path, seeds: Seeds) -> None:
    """Read samples as calibration does, up to the model."""
    from edgeprune.calib.samples import user_samples

    list(user_samples(_processor(seeds.checkpoint), file, folder, 3))


def _ask(file: Path, folder: Path) -> None:
    """Read questions as `compare` does, and their images as the runtime does."""
    from edgeprune.compare.questions import Questions
    from edgeprune.images import read_image

    questions = Questions(None, file, folder)
    assert questions.fingerprint
    for asked in questions:
        assert isinstance(asked.image, Path)
        read_image(asked.image)


@cache
def _processor(checkpoint: Path) -> Any:
    from edgeprune.models._processor import Processor

    return Processor(_adapter(checkpoint))
