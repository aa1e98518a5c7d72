"""Time and peak memory of exporting models of published sizes with a made-up UTP schedule, fp16.

    python -m benchmarks.export_size llava-1.5-7b internvl3-8b

The checkpoint is a sparse file of zeros, so it takes no disk; the bundle takes as much as the real
one and is removed at the end. Each model is exported in a process of its own, and memory is that
process's peak (Linux, macOS).
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.published import PUBLISHED
from benchmarks.speed import declining
from edgeprune.export.exporter import ExportRequest, export
from edgeprune.models import open_model
from edgeprune.models._processor import Processor
from edgeprune.policies import make
from edgeprune.spec import PruneSpec, plan_from_counts

COLUMNS = "| model | V | r_1 ... r_L | traced | done | written | peak memory |"


def measure(name: str, cr: float, work: Path) -> dict[str, Any]:
    """Export one model in this process; seconds at the start of each step, bytes."""
    published, output = PUBLISHED[name], work / f"{name}-utp"
    checkpoint = published.write(work / name)
    started, steps = time.perf_counter(), dict[str, float]()

    def report(step: str, done: int, total: int) -> None:
        steps.setdefault(step, time.perf_counter() - started)

    adapter, spec = open_model(str(checkpoint), size=published.size), PruneSpec("utp", cr)
    shape = adapter.shape
    counts = declining(shape.visual_tokens, shape.layers, cr)
    plan = plan_from_counts(shape.visual_tokens, counts)
    request = ExportRequest(name, spec, plan, output, dtype="fp16", no_parity="weights are zeros")
    exported = export(request, adapter, make(spec), Processor(adapter), [], report)
    seconds = time.perf_counter() - started
    written = sum(file.bytes for file in exported.manifest.files.values())
    shutil.rmtree(output)
    shutil.rmtree(checkpoint)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {
        "model": name,
        "visual_tokens": shape.visual_tokens,
        "counts": counts,
        "steps": steps,
        "seconds": seconds,
        "bytes": written,
        "peak_bytes": peak,
    }


def row(found: dict[str, Any]) -> str:
    """One line of the table."""
    counts, traced = found["counts"], found["steps"]["vision weights"]
    cells = [
        found["model"],
        f"{found['visual_tokens']:,}",
        f"{counts[0]:,} ... {counts[-1]:,}",
        f"{traced:.0f} s",
        f"{found['seconds']:.0f} s",
        f"{found['bytes'] / 1e9:.2f} GB",
        f"{found['peak_bytes'] / 1e9:.2f} GB",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and peak memory of large exports.")
    parser.add_argument("models", nargs="+", choices=PUBLISHED, metavar="MODEL")
    parser.add_argument("--cr", type=float, default=4)
    parser.add_argument("--work", type=Path, default=Path("out/size"))
    args = parser.parse_args()
    if len(args.models) == 1:
        found = measure(args.models[0], args.cr, args.work)
        print(f"{COLUMNS}\n{row(found)}\n{json.dumps(found)}")
        return
    print(COLUMNS + "\n" + "| --- " * COLUMNS.count(" | ") + "| --- |")
    for name in args.models:
        options = ["--cr", str(args.cr), "--work", str(args.work)]
        command = [sys.executable, "-m", "benchmarks.export_size", name, *options]
        told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        print(told.splitlines()[1], flush=True)


if __name__ == "__main__":
    main()
