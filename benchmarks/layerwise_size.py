"""Peak memory and time of calibration, parity and --weights auto, for weights of a real size.

    python -m benchmarks.layerwise_size 7b  # the first two; 27 GB of disk, removed after
    python -m benchmarks.layerwise_size 7b --only auto
    python -m benchmarks.layerwise_size 13b --only calibrate --sparse

Each command runs in a process of its own. Parity is that of an fp16 bundle: the range of float16,
the distance to float32, and graphs beside reference. A sparse checkpoint is zeros that take no
disk: memory and time are those of real weights, but nothing is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.shapes import SHAPES, write

COMMANDS = ("calibrate", "export")
AUTO = "auto"  # an export too, whose weights are mixed by what each loses


@dataclass(frozen=True)
class Cost:
    """What one command took."""

    shape: str
    command: str
    samples: int
    seconds: float
    peak_bytes: int
    said: str  # its last lines


def questions(folder: Path, count: int) -> Path:
    """Noise to look at, and what is asked about it, as LLaVA-Instruct writes it."""
    drawn, asked = np.random.default_rng(0), list[dict[str, object]]()
    for number in range(count):
        name = f"{number}.png"
        Image.fromarray(drawn.integers(0, 255, (336, 336, 3), np.uint8)).save(folder / name)
        talk = [
            {"from": "human", "value": "<image>\nHow many digits are there, and where?"},
            {"from": "gpt", "value": "three"},
        ]
        asked.append({"id": str(number), "image": name, "conversations": talk})
    file = folder / "samples.json"
    file.write_text(json.dumps(asked))
    return file


def command(name: str, work: Path, checkpoint: Path, samples: int) -> list[str]:
    asked = ["--model", str(checkpoint), "--samples-file", str(questions(work, samples))]
    if name == "calibrate":
        return [name, *asked, "--cr", "4", "--samples", str(samples), "-o", str(work / "plan.json")]
    if name == AUTO:
        mixed = ["--weights", "auto:clip=off", "--samples", str(samples), "--parity", "0"]
        dense = ["--target", "cuda", "--method", "none", "-o", str(work / "bundle")]
        return ["export", *asked, *mixed, *dense]
    lowered = ["--target", "cuda", "--dtype", "fp16", "--method", "fastv", "--cr", "4"]
    return [name, *asked, *lowered, "--parity", str(samples), "-o", str(work / "bundle")]


def measured(shape: str, name: str, samples: int, work: Path, checkpoint: Path) -> Cost:
    """Run one command; its peak memory is that of its process."""
    work.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"EDGEPRUNE_CACHE": str(work / "cache")}
    arguments = [sys.executable, "-m", "edgeprune", *command(name, work, checkpoint, samples)]
    began = time.perf_counter()
    with (work / "said.txt").open("w") as said:
        process = subprocess.Popen(arguments, stdout=said, stderr=said, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    text = (work / "said.txt").read_text().strip()
    if process.returncode:
        raise SystemExit(text)
    return Cost(shape, name, samples, seconds, 1024 * usage.ru_maxrss, text)


def table(costs: Sequence[Cost]) -> str:
    lines = [
        "| shape | command | samples | seconds | peak memory |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for one in costs:
        what = f"{one.shape} | `{one.command}` | {one.samples}"
        lines.append(f"| {what} | {one.seconds:.0f} | {one.peak_bytes / 1e9:.2f} GB |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and time of work that goes by layers.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--only", choices=(*COMMANDS, AUTO), help="one of these")
    parser.add_argument("--sparse", action="store_true", help="zeros that take no disk")
    parser.add_argument(
        "--samples", type=int, nargs=2, default=(4, 1), metavar=("CALIBRATE", "PARITY")
    )
    parser.add_argument("--work", type=Path, default=Path("out/layerwise"))
    args = parser.parse_args()
    names = [args.only] if args.only else COMMANDS
    counts = dict(zip(COMMANDS, args.samples, strict=True)) | {AUTO: args.samples[0]}
    costs = list[Cost]()
    try:
        checkpoint = args.work / args.shape
        # By a process of its own: Linux counts the peak of a parent as one of its children's.
        asked = SHAPES[args.shape], checkpoint
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as writer:
            writer.submit(write, *asked, sparse=args.sparse).result()
        for name in names:
            costs.append(measured(args.shape, name, counts[name], args.work, checkpoint))
            print(costs[-1].said)
    finally:
        shutil.rmtree(args.work, ignore_errors=True)
    print(table(costs))
    print(json.dumps([asdict(one) for one in costs]))


if __name__ == "__main__":
    main()
