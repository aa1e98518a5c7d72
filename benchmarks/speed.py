"""Pruned against dense on random weights of a real shape, with 64 text tokens.

    python -m benchmarks.speed 12x1024 --cr 4
    python -m benchmarks.speed onevision-0.5b --no-flat --rounds 4
    python -m benchmarks.speed 12x1024-clip --no-flat --encoders exit:at=6,exit:at=0 --profile
    python -m benchmarks.speed qwen2-vl-2b --no-flat --apart --rounds 4   # 23 GB of disk
    python -m benchmarks.speed 0.5b --no-flat --rounds 6 --new-tokens 32 \
        --weights float,int4,int8,int8:activations=on:smooth=off

Writes a checkpoint and two bundles below --work (kept, so a second run only measures), then times
both in turn with `edgeprune bench`. A third bundle, `flat`, is fed the pruned one's average number
of visual tokens from the start: the floor that in-decoder pruning can reach. With --apart only one
bundle is in memory at a time, opened anew for each round. With --profile the dense bundle is
profiled first, in a process of its own, and what that predicts of each bundle stands below the
table. Shapes of benchmarks.shapes have 576 visual tokens and a small vision tower; those of
benchmarks.published are whole models.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.predicted_time import predicted, profiled
from benchmarks.published import PUBLISHED
from benchmarks.schedules import declining
from benchmarks.shapes import SHAPES, write
from edgeprune import encoder_methods
from edgeprune.bench.bench import BenchRequest, BenchResult, RoundSeconds, Row, bench
from edgeprune.bench.table import table
from edgeprune.bundle import MANIFEST
from edgeprune.commands._common import image_size
from edgeprune.export.exporter import ExportRequest, export
from edgeprune.models import Adapter, open_model
from edgeprune.models._processor import Processor, random_prompt
from edgeprune.policies import make
from edgeprune.spec import Plan, PruneSpec, plan_from_counts
from edgeprune.tiling import Size


def opened(model: str, work: Path, size: Size | None = None) -> Adapter:
    """A checkpoint of random weights, written unless it is there; a whole model may be frozen for
    images of another size than its shape says."""
    folder, there = work / model, (work / model / "config.json").is_file()
    if model in SHAPES:
        return open_model(str(folder if there else write(SHAPES[model], folder)))
    published = PUBLISHED[model]
    if size is not None:
        published = replace(published, size=size)
    return published.open(folder if there else published.write(folder, sparse=False))


def bundle(
    adapter: Adapter, name: str, method: str, plan: Plan, cr: float, dtype: str, weights: str
) -> Path:
    """Export one bundle of a checkpoint, unless it is there."""
    checkpoint, dense = adapter.checkpoint.folder, method == "none"
    suffix = "" if weights == "float" else f"-{weights.replace(':', '-')}"
    output = checkpoint.parent / f"{checkpoint.name}-{name}-{dtype}{suffix}"
    if (output / MANIFEST).is_file():
        return output
    why = "timed only" if checkpoint.name in PUBLISHED else ""
    spec, processor = PruneSpec(method, cr), Processor(adapter)
    request = ExportRequest(
        checkpoint.name,
        spec,
        plan,
        output,
        dtype=dtype,
        weights=weights,
        no_parity=why,
        profilable=dense,
    )
    prompts = [random_prompt(adapter.pixels, adapter.shape.vocabulary, 0)]
    export(request, adapter, make(spec), processor, prompts)
    return output


def bundles(
    model: str,
    cr: float,
    work: Path,
    dtype: str,
    formats: Sequence[str],
    encoders: Sequence[str] = (),
    *,
    flat: bool,
    size: Size | None = None,
) -> tuple[Path, ...]:
    """Dense, pruned layer by layer, the same with each of some shorter encoders and, if asked, flat
    at the same average; in each format of weights."""
    adapter = opened(model, work, size)
    visual, layers = adapter.shape.visual_tokens, adapter.shape.layers
    pruned = plan_from_counts(visual, declining(visual, layers, cr))
    even = plan_from_counts(visual, (round(visual / cr),) * layers)
    kinds: list[tuple[str, str, Plan, float]] = [
        ("dense", "none", Plan(visual, layers), 1),
        (f"utp-cr{cr:g}", "utp", pruned, cr),
    ]
    if flat:
        kinds.append((f"flat-cr{cr:g}", "uniform", even, cr))
    made = [bundle(adapter, *kind, dtype, weights) for kind in kinds for weights in formats]
    for text in encoders:
        shorter = shortened(adapter, text)
        name = f"utp-cr{cr:g}-{text}".replace(":", "-").replace("=", "")
        made += [bundle(shorter, name, "utp", pruned, cr, dtype, weights) for weights in formats]
    return tuple(made)


def shortened(adapter: Adapter, text: str) -> Adapter:
    """With a shorter encoder whose map changes nothing: times do not depend on its numbers."""
    method = encoder_methods.make(text)
    assert method is not None
    return adapter.with_encoder(adapter.unfitted(adapter.encoder_site(method)))


def apart(request: BenchRequest) -> BenchResult:
    """As bench, with one bundle in memory at a time: each has a new process in each round."""
    single = [replace(request, bundles=(path,), rounds=1, warmup=1) for path in request.bundles]
    rounds = [[bench(one) for one in single] for _ in range(request.rounds)]
    rows = tuple(_joined([found.rows[0] for found in turn]) for turn in zip(*rounds, strict=True))
    names = [path.name for path in request.bundles]
    asked = rounds[0][0].request | {"bundles": names, "rounds": request.rounds}
    return replace(rounds[0][0], rows=rows, request=asked)


def _joined(rows: Sequence[Row]) -> Row:
    """One bundle's rows of one round each as one."""
    columns = [
        tuple(getattr(row.rounds, part)[0] for row in rows)
        for part in ("vision", "prefill", "decode")
    ]
    peak = max(row.peak_bytes or 0 for row in rows)
    return replace(rows[0], rounds=RoundSeconds(*columns), peak_bytes=peak)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time pruned against dense on random weights.")
    parser.add_argument("model", choices=[*SHAPES, *PUBLISHED], metavar="MODEL")
    parser.add_argument(
        "--image-size",
        type=image_size,
        metavar="WxH",
        help="of a whole model, where its family takes several (a --work of its own for each size)",
    )
    parser.add_argument("--cr", type=float, default=4)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--weights", default="float", help="formats, with commas between them")
    parser.add_argument(
        "--encoders", default="", help="shorter encoders with UTP, as exit:at=8,exit:keep=0.5"
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--backend", default="ort-cpu")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--no-flat", action="store_true", help="leave out the flat bundle")
    parser.add_argument("--apart", action="store_true", help="one bundle in memory at a time")
    parser.add_argument(
        "--profile", action="store_true", help="predict the times from a profile of the dense one"
    )
    parser.add_argument("--work", type=Path, default=Path("out/speed"))
    parser.add_argument("--json", type=Path, help="write every round here")
    args = parser.parse_args()
    if args.profile and "," in args.weights:
        parser.error("--profile is of one format of weights")
    formats, encoders = args.weights.split(","), [e for e in args.encoders.split(",") if e]
    asked = args.model, args.cr, args.work, args.dtype, formats, encoders
    paths = bundles(*asked, flat=not args.no_flat, size=args.image_size)
    request = BenchRequest(
        paths,
        (args.backend,),
        rounds=args.rounds,
        new_tokens=args.new_tokens,
        threads=args.threads,
    )
    profile = profiled(paths[0], args.backend, args.rounds, args.threads) if args.profile else None
    result = apart(request) if args.apart else bench(request)
    if profile is not None:
        adapter = opened(args.model, args.work, args.image_size)
        result = predicted(result, paths, adapter, profile)
    print(table(result))
    print(result.machine, file=sys.stderr)
    if args.json:
        args.json.write_text(result.to_json() + "\n")


if __name__ == "__main__":
    main()
