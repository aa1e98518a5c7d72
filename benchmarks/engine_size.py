"""Size of TensorRT engines against the weights they hold, on random weights of a real shape.

    python -m benchmarks.engine_size 0.5b --cr 4 --sites 5

Both profiles of the decoder should share one copy of the weights: well below twice their size.
What is above once their size is code, and most of that grows with the number of pruning sites.
Writes a checkpoint and a bundle below --work (kept), builds its engines, prints one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import onnx

from benchmarks.schedules import declining
from benchmarks.shapes import SHAPES, write
from edgeprune.bundle import MANIFEST
from edgeprune.export.exporter import ExportRequest, export
from edgeprune.models import open_model
from edgeprune.models._processor import Processor
from edgeprune.policies import make
from edgeprune.runtime import trt
from edgeprune.runtime.build import BuildRequest, build
from edgeprune.spec import Plan, PruneSpec, plan_from_counts


def stepped(counts: tuple[int, ...], sites: int) -> tuple[int, ...]:
    """A schedule that falls at most `sites` times: layers in runs, each run its mean."""
    layers = len(counts)
    starts = [round(n * layers / (sites + 1)) for n in range(sites + 2)]
    runs = [counts[a:b] for a, b in itertools.pairwise(starts)]
    return tuple(round(sum(run) / len(run)) for run in runs for _ in run)


def bundle(shape: str, cr: float, work: Path, dtype: str, sites: int | None = None) -> Path:
    """Export the shape with UTP at `cr`, dense at 1, unless it is there; nothing runs it."""
    checkpoint, method = work / shape, "utp" if cr > 1 else "none"
    falls = f"-{sites}" if sites else ""
    output = work / f"{shape}-{method}-cr{cr:g}{falls}-{dtype}-engines"
    if (output / MANIFEST).is_file():
        return output
    if not (checkpoint / "config.json").is_file():
        write(SHAPES[shape], checkpoint)
    layers, visual = SHAPES[shape].layers, SHAPES[shape].patches
    counts = declining(visual, layers, cr)
    counts = stepped(counts, sites) if sites else counts
    plan = Plan(visual, layers) if cr == 1 else plan_from_counts(visual, counts)
    adapter, spec = open_model(str(checkpoint)), PruneSpec(method, cr)
    processor = Processor(adapter)
    why = "only compiled, never run"
    request = ExportRequest(
        checkpoint.name, spec, plan, output, target="rtx", dtype=dtype, no_parity=why
    )
    export(request, adapter, make(spec), processor, [])
    return output


def weights(graph: Path) -> int:
    """Bytes of a graph's own tensors, those in weights.bin and those inside the file."""
    model = onnx.load(graph, load_external_data=False)
    total = 0
    for tensor in model.graph.initializer:
        external = {entry.key: entry.value for entry in tensor.external_data}
        total += int(external["length"]) if external else len(tensor.raw_data)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare engine sizes with weights.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--cr", type=float, default=4)
    parser.add_argument("--sites", type=int, help="pruning sites at most (default: all layers)")
    parser.add_argument("--dtype", default="fp16")
    parser.add_argument("--backend", choices=trt.MODULES, default="trt-rtx")
    parser.add_argument("--work", type=Path, default=Path("out/speed"))
    args = parser.parse_args()
    path = bundle(args.shape, args.cr, args.work, args.dtype, args.sites)
    built = build(BuildRequest(path, args.backend))
    result = {
        "case": path.name.removesuffix("-engines"),
        "version": built.record["version"],
    }
    for name, engine in built.record["engines"].items():
        held = weights(path / f"{name}.onnx")
        result[name] = {
            "engine_bytes": engine["bytes"],
            "weight_bytes": held,
            "ratio": round(engine["bytes"] / held, 4),
            "seconds": engine["seconds"],
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
