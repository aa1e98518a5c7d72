"""Time and peak memory of exporting models of published sizes with a made-up UTP schedule, fp16.

    python -m benchmarks.export_size --targets jetpack7 jetpack6          # all, one after the other
    python -m benchmarks.export_size llava-1.5-7b --targets jetpack6
    python -m benchmarks.export_size internvl2-8b --weights int4

The checkpoint is a set of sparse files of zeros, so it takes no disk; the bundle takes as much as
the real one and is removed before the next. Each bundle is exported in a process of its own, whose
peak memory is told. *Copying*, part of *seconds*, is writing weights and hashing files; *check* is
what `edgeprune check` says of the graphs for that target.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.published import PUBLISHED
from benchmarks.schedules import planned
from edgeprune.export.check import check_graph
from edgeprune.export.exporter import ExportRequest, export
from edgeprune.graphs import GRAPHS
from edgeprune.memory import peak_bytes
from edgeprune.models._processor import Processor
from edgeprune.policies import make
from edgeprune.spec import PruneSpec

COLUMNS = "| model | target | V | r_1 ... r_L | seconds | copying | written | peak memory | check |"
COPYING = ("vision weights", "decoder weights", "hash files")


class Clock:
    """How long an export copies and hashes bytes, by its own reports."""

    def __init__(self) -> None:
        self.copying, self.since, self.step = 0.0, time.perf_counter(), ""

    def report(self, step: str, done: int, total: int) -> None:
        """Count the time since the last report; a step whose end was told has ended."""
        now = time.perf_counter()
        if self.step in COPYING:
            self.copying += now - self.since
        self.since, self.step = now, step if done < total else ""

    def end(self) -> None:
        self.report("", 0, 0)


def measure(name: str, target: str, cr: float, work: Path, weights: str) -> dict[str, Any]:
    """Export one bundle in this process; seconds, bytes."""
    published, output = PUBLISHED[name], work / f"{name}-utp-{target}"
    checkpoint = published.write(work / name)
    clock, started = Clock(), time.perf_counter()
    try:
        adapter, spec = published.open(checkpoint), PruneSpec("utp", cr)
        shape = adapter.shape
        policy = make(spec)
        plan = planned(policy, shape, cr)
        kind = "fp16", weights
        request = ExportRequest(
            name, spec, plan, output, target, *kind, no_parity="weights are zeros"
        )
        exported = export(request, adapter, policy, Processor(adapter), [], clock.report)
        clock.end()
        seconds, peak = time.perf_counter() - started, peak_bytes()
        return {
            "model": name,
            "target": target,
            "visual_tokens": shape.visual_tokens,
            "counts": plan.counts,
            "seconds": seconds,
            "copying": clock.copying,
            "bytes": sum(file.bytes for file in exported.manifest.files.values()),
            "peak_bytes": peak or 0,
            "refusals": refusals(output, target),
        }
    finally:
        shutil.rmtree(output, ignore_errors=True)
        shutil.rmtree(checkpoint)


def refusals(bundle: Path, target: str) -> list[str]:
    """What `edgeprune check` has against the graphs for a target; none where it accepts them."""
    verdicts = [v for graph in GRAPHS for v in check_graph(bundle / graph)]
    own = [verdict for verdict in verdicts if target in verdict.target.names]
    assert len(own) == len(GRAPHS)
    return sorted({problem.message for verdict in own for problem in verdict.problems})


def row(found: dict[str, Any]) -> str:
    """One line of the table."""
    counts = found["counts"]
    cells = [
        found["model"],
        found["target"],
        f"{found['visual_tokens']:,}",
        f"{counts[0]:,} ... {counts[-1]:,}",
        f"{found['seconds']:.0f} s",
        f"{found['copying']:.0f} s",
        f"{found['bytes'] / 1e9:.2f} GB",
        f"{found['peak_bytes'] / 1e9:.2f} GB",
        "; ".join(found["refusals"]) or "accepted",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and peak memory of large exports.")
    known = f"of: {', '.join(PUBLISHED)} (default: all)"
    parser.add_argument("models", nargs="*", default=list(PUBLISHED), metavar="MODEL", help=known)
    parser.add_argument("--targets", nargs="+", default=["jetpack7"], metavar="TARGET")
    parser.add_argument("--cr", type=float, default=4)
    parser.add_argument("--weights", default="float", metavar="FORMAT", help="as export takes it")
    parser.add_argument("--work", type=Path, default=Path("out/size"))
    args = parser.parse_args()
    if unknown := [name for name in args.models if name not in PUBLISHED]:
        parser.error(f"no model {unknown[0]!r}; {known}")
    if len(args.models) == len(args.targets) == 1:
        one = args.models[0], args.targets[0]
        found = measure(*one, args.cr, args.work, args.weights)
        print(f"{COLUMNS}\n{row(found)}\n{json.dumps(found)}")
        return
    print(COLUMNS + "\n" + "| --- " * (COLUMNS.count("|") - 1) + "|")
    for name, target in itertools.product(args.models, args.targets):
        options = ["--targets", target, "--cr", str(args.cr), "--work", str(args.work)]
        options += ["--weights", args.weights]
        command = [sys.executable, "-m", "benchmarks.export_size", name, *options]
        told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        print(told.splitlines()[1], flush=True)


if __name__ == "__main__":
    main()
