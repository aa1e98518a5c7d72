"""What an exit loses where each window of a tower keeps a share, and where all compete.

    python -m benchmarks.window_choice

A tiny Qwen2.5-VL with random weights, images of the demo: R2 of the exit's map, and the angle
between the decoder's last features. Random weights answer nothing: this says nothing of accuracy.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.qwen_shapes import QwenShape, write
from edgeprune.demo.scenes import draw, make_scene
from edgeprune.encoder_methods._method import EACH, JOINT
from edgeprune.making import make
from edgeprune.recipe import Recipe
from edgeprune.spec import PruneSpec
from edgeprune.tables import plain
from edgeprune.tiling import Size

SHAPE = QwenShape(
    layers=4,
    width=64,
    mlp=96,
    heads=4,
    kv_heads=2,
    vocabulary=270,
    positions=512,
    windowed=True,
    blocks=8,
    vision_width=64,
    vision_mlp=128,
    vision_heads=2,
    full=(3, 7),
)
SIDE = 336  # pixels of an image: 3 x 3 windows
SITES = (0, 0.5), (2, 0.5), (4, 0.5), (4, 0.25)
"""The block before which patches leave, and the share that goes on."""


def samples(folder: Path, count: int) -> Path:
    """Scenes of the demo, with a question each."""
    records = list[object]()
    for seed in range(count):
        name = f"{seed}.png"
        draw(make_scene(seed, "train")).resize((SIDE, SIDE)).save(folder / name)
        turn = {"from": "human", "value": "<image>\nwhat is there ?"}
        records.append({"id": str(seed), "image": name, "conversations": [turn]})
    file = folder / "samples.json"
    file.write_text(json.dumps(records))
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description="Exits of each window, and of all together.")
    parser.add_argument("--samples", type=int, default=40)
    args = parser.parse_args()
    rows = [("exit", "windows", "operations", "R2", "angle")]
    with TemporaryDirectory() as made:
        folder = Path(made)
        model = write(SHAPE, folder / "model", dtype=torch.bfloat16)
        file = samples(folder, args.samples)
        for (at, keep), windows in product(SITES, (EACH, JOINT)):
            text = f"exit:at={at}:keep={keep}:limit=3:windows={windows}"
            recipe = Recipe(
                PruneSpec("none"),
                folder / f"{at}-{keep}-{windows}",
                str(model),
                image_size=Size(SIDE, SIDE),
                encoder=text,
                samples_file=file,
                samples=args.samples,
                parity=0,
            )
            found = make(recipe).manifest.encoder
            assert found.r2 is not None and found.angle is not None  # of an exit
            row = f"at={at}:keep={keep}", windows, f"{found.share:.2f}", f"{found.r2:.2f}"
            rows.append((*row, f"{found.angle:.3f}"))
    print(plain(rows))


if __name__ == "__main__":
    main()
