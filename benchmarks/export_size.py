"""Time and peak memory of exporting a decoder of real size with a made-up UTP schedule.

    python -m benchmarks.export_size 7b

The checkpoint is a sparse file of zeros, so it takes no disk; the bundle takes as much as the real
one and is removed at the end. Memory is the process's own peak (Linux, macOS).
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import time
from pathlib import Path

from benchmarks.shapes import SHAPES, write
from benchmarks.speed import declining
from edgeprune.export.exporter import ExportRequest, export
from edgeprune.models import open_model
from edgeprune.models._processor import Processor
from edgeprune.policies import make
from edgeprune.spec import PruneSpec, plan_from_counts


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and peak memory of a large export.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--cr", type=float, default=4)
    parser.add_argument("--work", type=Path, default=Path("out/size"))
    args = parser.parse_args()
    checkpoint, output = args.work / args.shape, args.work / f"{args.shape}-utp"
    write(SHAPES[args.shape], checkpoint, sparse=True)
    started, steps = time.perf_counter(), dict[str, float]()

    def report(step: str, done: int, total: int) -> None:
        steps.setdefault(step, time.perf_counter() - started)

    adapter = open_model(str(checkpoint))
    processor = Processor(adapter)
    counts = declining(adapter.shape.visual_tokens, adapter.shape.layers, args.cr)
    plan, spec = plan_from_counts(adapter.shape.visual_tokens, counts), PruneSpec("utp", args.cr)
    request = ExportRequest(
        args.shape, spec, plan, output, dtype="fp16", no_parity="weights are zeros"
    )
    exported = export(request, adapter, make(spec), processor, [], report)
    total = time.perf_counter() - started
    written = sum(file.bytes for file in exported.manifest.files.values())
    shutil.rmtree(output)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    for step, begun in steps.items():
        print(f"{begun:7.1f} s  {step} begins")
    print(f"{total:7.1f} s  done: {written / 1e9:.2f} GB written, peak memory {peak / 1e9:.2f} GB")
    print(json.dumps({"shape": args.shape, "seconds": total, "peak_bytes": peak, "steps": steps}))


if __name__ == "__main__":
    main()
