"""What `export --keep-fp32 auto` costs: parts in float32 beside the same model in plain float16.

    python -m benchmarks.keep_fp32 12x1024 --rounds 0     # counts only, where the machine is busy
    python -m benchmarks.keep_fp32 12x1024 --rounds 20
    python -m benchmarks.keep_fp32 0.5b --backend ort-cuda --rounds 20

A checkpoint of random weights passes 65,504 nowhere. So each kind of overflow that real models
have is planted in a copy, in the middle layer: the residual stream, which stays in float32 from
there on; gate * up; attention scores. Bundles lie below --work and are kept, so a second run only
measures. All are timed by `edgeprune bench`, once in every round; ratios are to plain float16.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from safetensors.torch import load_file, save_file

from benchmarks.shapes import SHAPES, write
from edgeprune.bench.bench import BenchRequest, bench
from edgeprune.bench.table import table
from edgeprune.bundle import MANIFEST, Bundle
from edgeprune.export.ranges import summary
from edgeprune.graphs import GRAPHS
from edgeprune.making import make
from edgeprune.recipe import Recipe
from edgeprune.spec import PruneSpec

ELEMENT = 2
"""Bytes of a float16 weight."""

ROW = 1e5
"""The factor of one row alone."""

PLANTED: dict[str, dict[str, float]] = {
    "residual": {"mlp.up_proj.weight": 30, "mlp.down_proj.weight": ROW},
    "gate-up": {
        "mlp.gate_proj.weight": 1e3,
        "mlp.up_proj.weight": 1e3,
        "mlp.down_proj.weight": 1e-4,
    },
    "scores": {"self_attn.q_proj.weight": 300, "self_attn.k_proj.weight": 300},
}
"""Factors of tensors of the middle layer."""


@dataclass(frozen=True)
class Counts:
    """What a bundle's graphs hold."""

    nodes: int
    casts: int
    cast_bytes: int  # of weights that every call of the graphs casts
    weights: int  # bytes of weights.bin


def counted(bundle: Path) -> Counts:
    """Nodes, casts and bytes of all graphs."""
    models = [onnx.load(bundle / name, load_external_data=False).graph for name in GRAPHS]
    sizes = {t.name: ELEMENT * _product(t.dims) for graph in models for t in graph.initializer}
    casts = [node for graph in models for node in graph.node if node.op_type == "Cast"]
    return Counts(
        sum(len(graph.node) for graph in models),
        len(casts),
        sum(sizes.get(node.input[0], 0) for node in casts),
        (bundle / "weights.bin").stat().st_size,
    )


def _product(sizes: Iterator[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def planted(clean: Path, copy: Path, kind: str, layer: int) -> Path:
    """A copy of a checkpoint with one overflow in a layer of its decoder."""
    if (copy / "config.json").is_file():
        return copy
    shutil.copytree(clean, copy)
    for file in copy.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if f".layers.{layer}." not in name or not name.startswith("language_model."):
                continue
            for end, factor in PLANTED[kind].items():
                if name.endswith(end):
                    tensor = tensors[name] = tensor.float()
                    tensor[slice(5, 6) if factor == ROW else ...] *= factor
        save_file(tensors, file, {"format": "pt"})
    return copy


def exported(model: Path, output: Path, target: str, keep: str) -> Path:
    """A dense bundle in float16, unless it is there."""
    if not (output / MANIFEST).is_file():
        spec, parity = PruneSpec("none"), 1 if keep == "auto" else 0
        options = {"target": target, "dtype": "fp16", "keep_fp32": keep, "parity": parity}
        make(Recipe(spec, output, str(model), **options))
    return output


def bundles(shape: str, target: str, work: Path, tell: Callable[[str], None]) -> dict[str, Path]:
    """Plain float16, and a bundle for each kind of overflow, by name."""
    clean, layer = work / shape, SHAPES[shape].layers // 2
    if not (clean / "config.json").is_file():
        write(SHAPES[shape], clean)
    found = {"plain": exported(clean, work / f"{shape}-{target}-plain", target, "none")}
    for kind in PLANTED:
        tell(f"{kind}: export")
        model = planted(clean, work / f"{shape}-{kind}", kind, layer)
        found[kind] = exported(model, work / f"{shape}-{target}-{kind}", target, "auto")
    return found


def rows(found: dict[str, Path]) -> Iterator[str]:
    """A line of Markdown for each bundle."""
    yield "| bundle | nodes | casts | weights cast a call | weights.bin | in float32 |"
    yield "| --- | ---: | ---: | ---: | ---: | --- |"
    for name, path in found.items():
        counts, record = counted(path), Bundle.open(path, verify=False).manifest.range
        kept = ", ".join(summary(record)) if record else ""
        yield (
            f"| {name} | {counts.nodes:,} | {counts.casts:,} | {counts.cast_bytes / 1e6:.2f} MB |"
            f" {counts.weights / 1e6:.2f} MB | {kept} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of parts in float32.")
    parser.add_argument("shape", choices=list(SHAPES), metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("--target", default="cuda")
    parser.add_argument("--backend", default="ort-cpu")
    parser.add_argument("--rounds", type=int, default=10, help="0: count only")
    parser.add_argument("--work", type=Path, default=Path("out/keep-fp32"))
    args = parser.parse_args()
    found = bundles(args.shape, args.target, args.work, lambda text: print(text, file=sys.stderr))
    print("\n".join(rows(found)))
    if args.rounds:
        paths = tuple(found.values())
        print(table(bench(BenchRequest(paths, (args.backend,), rounds=args.rounds, new_tokens=16))))


if __name__ == "__main__":
    main()
