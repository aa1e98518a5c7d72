"""Pruned against dense on random weights of a real shape: 576 visual and 64 text tokens.

    python -m benchmarks.speed 12x1024 --cr 4

Writes a checkpoint and two bundles below --work (kept, so a second run only measures), then times
both in turn with `edgeprune bench`. A third bundle, `flat`, is fed the pruned one's average number
of visual tokens from the start: the floor that in-decoder pruning can reach.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.shapes import SHAPES, write
from edgeprune.bundle import MANIFEST
from edgeprune.export.exporter import ExportRequest, export
from edgeprune.models import open_model
from edgeprune.models._processor import Processor, random_prompt
from edgeprune.policies import make
from edgeprune.runtime.bench import BenchRequest, BenchResult, bench
from edgeprune.spec import Plan, PruneSpec, budget, plan_from_counts


def declining(visual: int, layers: int, cr: float) -> tuple[int, ...]:
    """A made-up schedule of the usual form: r_l falls by a constant factor, the sum is exact.

    r_1 = min(V, 4V / CR), as UTP has it; the factor is found by bisection.
    """
    total, first = budget(visual, layers, cr), min(visual, round(4 * visual / cr))
    low, high = 0.0, 1.0
    for _ in range(60):
        factor = (low + high) / 2
        if sum(first * factor**layer for layer in range(layers)) < total:
            low = factor
        else:
            high = factor
    counts = [round(first * low**layer) for layer in range(layers)]
    counts[-1] = max(0, counts[-1] + total - sum(counts))
    spare, layer = total - sum(counts), layers - 1
    while spare:  # rounding left a token or two: give or take them where order allows
        step = 1 if spare > 0 else -1
        if layer and 0 <= counts[layer] + step <= counts[layer - 1]:
            counts[layer] += step
            spare -= step
        layer = layer - 1 if layer > 1 else layers - 1
    return tuple(sorted(counts, reverse=True))


def bundle(name: str, method: str, plan: Plan, cr: float, checkpoint: Path, dtype: str) -> Path:
    """Export one bundle of a checkpoint, unless it is there."""
    output = checkpoint.parent / f"{checkpoint.name}-{name}-{dtype}"
    if (output / MANIFEST).is_file():
        return output
    adapter = open_model(str(checkpoint))
    spec = PruneSpec(method, cr)
    processor = Processor(adapter)
    request = ExportRequest(checkpoint.name, spec, plan, output, dtype=dtype)
    prompts = [random_prompt(adapter.pixels, adapter.shape.vocabulary, 0)]
    export(request, adapter, make(spec), processor, prompts)
    return output


def bundles(shape: str, cr: float, work: Path, dtype: str) -> tuple[Path, ...]:
    """Checkpoint and bundles: dense, pruned layer by layer, flat at the same average."""
    checkpoint = work / shape
    if not (checkpoint / "config.json").is_file():
        write(SHAPES[shape], checkpoint)
    visual, layers = 576, SHAPES[shape].layers
    pruned = plan_from_counts(visual, declining(visual, layers, cr))
    flat = plan_from_counts(visual, (round(visual / cr),) * layers)
    return (
        bundle("dense", "none", Plan(visual, layers), 1, checkpoint, dtype),
        bundle(f"utp-cr{cr:g}", "utp", pruned, cr, checkpoint, dtype),
        bundle(f"flat-cr{cr:g}", "uniform", flat, cr, checkpoint, dtype),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Time pruned against dense on random weights.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--cr", type=float, default=4)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--backend", default="ort-cpu")
    parser.add_argument("--laps", type=int, default=10)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--work", type=Path, default=Path("out/speed"))
    parser.add_argument("--json", type=Path, help="write every lap here")
    args = parser.parse_args()
    paths = bundles(args.shape, args.cr, args.work, args.dtype)
    request = BenchRequest(paths, args.backend, laps=args.laps, new_tokens=args.new_tokens)
    result: BenchResult = bench(request)
    print(result.table())
    print(result.machine, file=sys.stderr)
    if args.json:
        args.json.write_text(result.to_json() + "\n")


if __name__ == "__main__":
    main()
