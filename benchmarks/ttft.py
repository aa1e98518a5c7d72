"""How near bundles come to the time to first token that was asked for.

    python -m benchmarks.ttft --threads 2 --json benchmarks/results/ttft-demo-2-threads.json
    python -m benchmarks.ttft --model 12x1024-clip --budgets 3 -o out/ttft-12x1024   # 12 GB of disk

The dense bundle is profiled in a process of its own, bundles are exported for times between the
fastest that the profile predicts and the dense one's, and all are opened and timed in turn, each in
a new process in every round. Reached is the median over processes of vision and prefill, and the
profile's reading and preprocessing. Run it on an idle machine. A model of benchmarks.shapes has
random weights, calibrated on the demo's scenes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.shapes import SHAPES, write
from edgeprune.bench.bench import BenchRequest, bench
from edgeprune.bundle import MANIFEST, Bundle
from edgeprune.calib.calibrate import CalibrationRequest
from edgeprune.calib.survey import Survey, Work, joint_spec
from edgeprune.calib.ttft import open_costs, undominated
from edgeprune.demo.questions import held_out
from edgeprune.encoder_methods import AUTO
from edgeprune.files import write_whole
from edgeprune.making import make
from edgeprune.models import open_model
from edgeprune.models._processor import Processor
from edgeprune.policies import make as make_policy
from edgeprune.progress import Bar
from edgeprune.recipe import Recipe
from edgeprune.spec import PruneSpec
from edgeprune.tables import plain
from edgeprune.timing import read_profile

SPARE = 1e-3
"""Milliseconds that are asked for beyond the fastest, against rounding."""


SAMPLES = 8
"""Of a model with random weights."""
IN_ONE = 5
"""Rounds in one process."""


def source(model: str, output: Path) -> dict[str, Any]:
    """The checkpoint and the samples of a recipe."""
    if model == "demo":
        return {}
    folder, samples = output / "model", output / "samples"
    if not (folder / "config.json").is_file():
        write(SHAPES[model], folder)
    samples.mkdir(exist_ok=True)
    records = list[dict[str, Any]]()
    for number, (image, question) in enumerate(held_out(SAMPLES)):
        image.save(samples / f"{number}.png")
        turns = [("human", f"<image>\n{question.text}"), ("gpt", question.answer)]
        talk = [{"from": who, "value": text} for who, text in turns]
        records.append({"image": f"{number}.png", "conversations": talk})
    write_whole(samples / "samples.json", json.dumps(records).encode())
    return {"model": str(folder), "samples": SAMPLES, "samples_file": samples / "samples.json"}


def opened(paths: Sequence[Path], args: argparse.Namespace, text_tokens: int) -> list[list[float]]:
    """Milliseconds of vision and prefill of each bundle, a median of some rounds in every process.

    Bundles take turns, one alone in memory at a time, as it is used; some machines give one process
    a fifth more time than the next.
    """
    times: list[list[float]] = [[] for _ in paths]
    for turn in range(args.rounds):
        for place in range(len(paths)):
            number = (turn + place) % len(paths)
            request = BenchRequest(
                (paths[number],),
                text_tokens=text_tokens,
                new_tokens=1,
                rounds=IN_ONE,
                threads=args.threads,
            )
            rounds = bench(request).rows[0].rounds
            pairs = zip(rounds.vision, rounds.prefill, strict=True)
            times[number].append(1e3 * statistics.median(v + p for v, p in pairs))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description="Asked, predicted and reached times.")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/ttft"))
    parser.add_argument("--model", default="demo", help="demo, or one of benchmarks.shapes")
    parser.add_argument("--budgets", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=20, help="of the profile, and processes")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    dense, file = args.output / "dense", args.output / "profile.json"
    of = source(args.model, args.output)
    if not (dense / MANIFEST).is_file():
        make(Recipe(PruneSpec("none"), dense, profilable=True, parity=0, **of))
    if not file.is_file():
        command = [sys.executable, "-m", "edgeprune", "profile", str(dense), "-o", str(file)]
        threads = ["--threads", str(args.threads)] if args.threads else []
        subprocess.run([*command, "--rounds", str(args.rounds), *threads], check=True)
    profile, adapter = read_profile(file), open_model(of.get("model", "demo"))
    policy = make_policy(joint_spec(PruneSpec("utp", 1)))
    costs = open_costs(adapter, profile, policy)
    with Bar() as bar:
        request = CalibrationRequest(1, of.get("samples", 100), of.get("samples_file"))
        work = Work(request, adapter, policy, Processor(adapter), bar)
        found = undominated(Survey(work, costs, AUTO).all_points())
    first, last = found[0].spent + SPARE, found[-1].spent
    asked = [first + n * (last - first) / (args.budgets - 1) for n in range(args.budgets)]
    paths = list[Path]()
    for ms in asked:
        output = args.output / f"ttft{ms:.2f}"
        budget = {"ttft": ms, "profile": file, "encoder": AUTO}
        paths.append(make(Recipe(PruneSpec("utp", 4), output, parity=0, **budget, **of)).path)
    rows, kept = [], []
    for ms, path, times in zip(asked, paths, opened(paths, args, profile.text_tokens), strict=True):
        manifest = Bundle.open(path).manifest
        timing, encoder = manifest.timing, manifest.encoder.method
        assert timing is not None
        reached = [costs.before + one for one in times]
        median, cr = statistics.median(reached), manifest.prune.cr_reached
        low, high = np.percentile(reached, (10, 90))
        row = f"{ms:.2f}", f"{timing.predicted:.2f}", f"{median:.2f} ({low:.2f}-{high:.2f})"
        rows.append((*row, f"{median / ms - 1:+.1%}", encoder, f"{cr:.2f}"))
        kept.append({"asked": ms, "predicted": timing.predicted, "reached": reached})
    head = "asked ms", "predicted", "reached", "off", "encoder", "CR"
    print(plain([head, *rows]))
    if args.json:
        write_whole(args.json, json.dumps({"machine": profile.machine, "rows": kept}).encode())


if __name__ == "__main__":
    main()
