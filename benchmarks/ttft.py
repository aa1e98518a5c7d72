"""How near bundles come to the time to first token that was asked for.

    python -m benchmarks.ttft -o out/ttft --json benchmarks/results/ttft-demo.json

On the demo: the dense bundle is profiled in a process of its own, five bundles are exported for
times between the fastest that the profile predicts and the dense one's, and all are timed in turn.
Reached is the median over rounds of vision and prefill, and the profile's reading and
preprocessing. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from edgeprune.bench.bench import BenchRequest, bench
from edgeprune.bundle import MANIFEST, Bundle
from edgeprune.calib.calibrate import CalibrationRequest
from edgeprune.calib.planning import Work, methods_of, survey
from edgeprune.calib.ttft import open_costs, undominated
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

SHARES = 0.0, 0.25, 0.5, 0.75, 1.0
"""Of the way from the fastest to the dense model."""
SPARE = 1e-3
"""Milliseconds that are asked for beyond the fastest, against rounding."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Asked, predicted and reached times.")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/ttft"))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    dense, file = args.output / "dense", args.output / "profile.json"
    if not (dense / MANIFEST).is_file():
        make(Recipe(PruneSpec("none"), dense, profilable=True, parity=0))
    if not file.is_file():
        command = [sys.executable, "-m", "edgeprune", "profile", str(dense), "-o", str(file)]
        threads = ["--threads", str(args.threads)] if args.threads else []
        subprocess.run([*command, "--rounds", str(args.rounds), *threads], check=True)
    profile, adapter = read_profile(file), open_model("demo")
    costs, policy = open_costs(adapter, profile), make_policy(PruneSpec("utp", 1))
    with Bar() as bar:
        work = Work(CalibrationRequest(1), adapter, policy, Processor(adapter), bar)
        found = undominated(survey(work, costs, methods_of(AUTO, adapter)))
    first, last = found[0].ms + SPARE, found[-1].ms
    asked = [first + share * (last - first) for share in SHARES]
    paths = list[Path]()
    for ms in asked:
        output = args.output / f"ttft{ms:.2f}"
        budget = {"ttft": ms, "profile": file, "encoder": AUTO}
        paths.append(make(Recipe(PruneSpec("utp", 4), output, parity=0, **budget)).path)
    request = BenchRequest(
        (dense, *paths),
        text_tokens=profile.text_tokens,
        new_tokens=1,
        rounds=args.rounds,
        threads=args.threads,
    )
    result, rows, kept = bench(request), [], []
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
