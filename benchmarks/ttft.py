"""How near bundles come to the time to first token that was asked for.

    python -m benchmarks.ttft -o out/ttft --json benchmarks/results/ttft-demo.json
    python -m benchmarks.ttft --model 12x1024-clip --budgets 3 -o out/ttft-12x1024   # 12 GB of disk

The dense bundle is profiled in a process of its own, bundles are exported for times between the
fastest that the profile predicts and the dense one's, and all are timed in turn. Reached is the
median over rounds of vision and prefill, and the profile's reading and preprocessing. Run it on an
idle machine. A model of benchmarks.shapes has random weights, calibrated on the demo's scenes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.shapes import SHAPES, write
from edgeprune.bench.bench import BenchRequest, bench
from edgeprune.bundle import MANIFEST, Bundle
from edgeprune.calib.calibrate import CalibrationRequest
from edgeprune.calib.planning import Work, joint_spec, survey
from edgeprune.calib.ttft import open_costs, undominated
from edgeprune.demo.questions import held_out
from edgeprune.encoder_methods import AUTO
from edgeprune.files import write_whole
from edgeprune.models import open_model
from edgeprune.models._processor import Processor
from edgeprune.policies import make as make_policy
from edgeprune.progress import Bar
from edgeprune.recipe import Recipe, make
from edgeprune.spec import PruneSpec
from edgeprune.tables import plain
from edgeprune.timing import read_profile

SPARE = 1e-3
"""Milliseconds that are asked for beyond the fastest, against rounding."""


SAMPLES = 8
"""Of a model with random weights."""


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


def main() -> None:
    parser = argparse.ArgumentParser(description="Asked, predicted and reached times.")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/ttft"))
    parser.add_argument("--model", default="demo", help="demo, or one of benchmarks.shapes")
    parser.add_argument("--budgets", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=20)
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
        found = undominated(survey(work, costs, AUTO))
    first, last = found[0].ms + SPARE, found[-1].ms
    asked = [first + n * (last - first) / (args.budgets - 1) for n in range(args.budgets)]
    paths = list[Path]()
    for ms in asked:
        output = args.output / f"ttft{ms:.2f}"
        budget = {"ttft": ms, "profile": file, "encoder": AUTO}
        paths.append(make(Recipe(PruneSpec("utp", 4), output, parity=0, **budget, **of)).path)
    timing_request = BenchRequest(
        (dense, *paths),
        text_tokens=profile.text_tokens,
        new_tokens=1,
        rounds=args.rounds,
        threads=args.threads,
    )
    result, rows, kept = bench(timing_request), [], []
    for ms, path, row in zip(asked, paths, result.rows[1:], strict=True):
        pairs = zip(row.rounds.vision, row.rounds.prefill, strict=True)
        reached = costs.before + 1e3 * statistics.median(v + p for v, p in pairs)
        timing, encoder = Bundle.open(path).manifest.timing, row.encoder
        assert timing is not None
        times = f"{ms:.2f}", f"{timing.predicted:.2f}", f"{reached:.2f}", f"{reached / ms - 1:+.1%}"
        rows.append((*times, encoder, f"{row.cr:.2f}"))
        kept.append({"asked": ms, "predicted": timing.predicted, "reached": reached})
    head = "asked ms", "predicted", "reached", "off", "encoder", "CR"
    print(plain([head, *rows]))
    if args.json:
        write_whole(args.json, json.dumps({"machine": profile.machine, "rows": kept}).encode())


if __name__ == "__main__":
    main()
