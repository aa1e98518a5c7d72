"""Manifests altered with regard to the type of each field; the files they list are good."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random

from tests.fuzz.case import Case, command
from tests.fuzz.mutate import alter, parses
from tests.fuzz.seeds import QUESTION, Seeds

WEIGHT = 22
PARTS = ("decoder", "image", "text", "prune", "ratios", "weights")


def make(rng: Random, seeds: Seeds, folder: Path) -> Case:
    bundle = Path(shutil.copytree(rng.choice(seeds.bundles), folder / "bundle"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    part = rng.choice([*(part for part in PARTS if manifest[part]), "all", "all"])
    tree = manifest if part == "all" else manifest[part]
    text, note = alter({part: tree}, rng)
    if part != "all":
        manifest[part] = "@@part@@"
        inner = text.removeprefix(f'{{"{part}": ').removesuffix("}")
        text = json.dumps(manifest).replace('"@@part@@"', inner)
    else:
        text = text.removeprefix('{"all": ').removesuffix("}")
    (bundle / "manifest.json").write_text(text)
    return Case(ask(bundle, seeds, rng, folder), note, parses(text))


def ask(bundle: Path, seeds: Seeds, rng: Random, folder: Path) -> object:
    """One of the commands that open a bundle."""
    ratio = ("--cr", 1.2) if rng.random() < 0.2 else ()
    image = ("--image", seeds.image, "--prompt", QUESTION, *ratio)
    return rng.choice(
        [
            command("run", bundle, *image, "--max-new-tokens", 3, "--threads", 1),
            command("run", bundle, *image, "--threads", 1, "--prompt", "and now ?", "--json"),
            command("run", bundle, *image, "--threads", 1, "--max-new-tokens", 2, "--top-k", 3),
            command("show", bundle, *image, "--threads", 1, "-o", folder / "what.png"),
            command("check", bundle),
        ]
    )
