"""`python -m benchmarks.gpu`: latency of eager torch, ONNX Runtime and TensorRT on one GPU.

    python -m benchmarks.gpu prepare out/gpu/bundles              # with torch, on any machine
    python -m benchmarks.gpu run out/gpu/bundles out/gpu/results  # with the GPU
    python -m benchmarks.gpu table out/gpu/results --figure gpu.png

`prepare` writes bundles without weights, a few megabytes in all, which may be copied to a device;
`run` fills them with random weights there. `run --dry` does every step in little on the CPU.

Where the device reaches no package index, another machine fills a folder that travels along:

    python -m benchmarks.gpu wheels out/wheels --extras gpu --python 3.12
    python -m benchmarks.gpu run out/gpu/bundles out/gpu/results --wheels out/wheels
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import figure, install, report
from benchmarks.gpu.cells import Cell, cells, tiny
from benchmarks.gpu.steps import Request, run
from edgeprune.bundle import MANIFEST
from edgeprune.drawing import image_files


def _arguments() -> argparse.Namespace:
    title = "Latency of eager torch, ONNX Runtime and TensorRT on one GPU."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=title)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("prepare", help="export bundles without weights; needs torch")
    one.add_argument("prepared", type=Path)
    two = commands.add_parser("run", help="measure; a run that was ended goes on")
    two.add_argument("prepared", type=Path)
    two.add_argument("results", type=Path)
    two.add_argument("--backends", nargs="+", metavar="BACKEND", help="default: ort-cuda")
    install.add(two)
    two.add_argument("--rounds", type=int, default=10)
    two.add_argument("--no-eager", action="store_true", help="leave out eager torch")
    two.add_argument("--no-tests", action="store_true", help="leave out pytest -m gpu")
    two.add_argument("--minutes", type=float, default=60, help="start nothing after so many")
    for command in (one, two):
        command.add_argument("--only", default="", help="cells whose name has this in it")
        command.add_argument("--dry", action="store_true", help="a tiny shape, on the CPU")
    three = commands.add_parser("table", help="what was measured")
    three.add_argument("results", type=Path)
    three.add_argument("--figure", type=Path, metavar="FILE", help="also draw it (.png or .svg)")
    install.add_download(commands)
    return parser.parse_args()


def _chosen(args: argparse.Namespace) -> tuple[Cell, ...]:
    every = tiny() if args.dry else cells()
    return tuple(cell for cell in every if args.only in cell.name)


def _prepared(chosen: Sequence[Cell], folder: Path) -> tuple[Cell, ...]:
    """Those whose bundle is there; the others are told."""
    there = tuple(cell for cell in chosen if (folder / cell.name / MANIFEST).is_file())
    if missing := [cell.name for cell in chosen if cell not in there]:
        print(f"not prepared: {', '.join(missing)}", flush=True)
    return there


def main() -> None:
    args = _arguments()
    if args.command == "table":
        print(report.table(args.results))
        if args.figure:
            image_files.save(figure.figure(args.results), args.figure)
    elif args.command == "wheels":
        install.download(args.folder, args.extras, args.python, args.platform)
    elif args.command == "prepare":
        from benchmarks.gpu.prepare import prepare, prepare_demo

        args.prepared.mkdir(parents=True, exist_ok=True)
        prepare_demo(args.prepared, ("none", "utp") if args.dry or args.only else ())
        prepare(_chosen(args), args.prepared)
    else:
        usual = ["ort-cpu"] if args.dry else ["ort-cuda"]
        backends = tuple(args.backends or usual)
        run(
            Request(
                _prepared(_chosen(args), args.prepared),
                args.prepared,
                args.results,
                backends,
                device="cpu" if args.dry else "cuda",
                rounds=args.rounds,
                eager=not args.no_eager,
                tests=not args.no_tests,
                deadline=time.monotonic() + 60 * args.minutes,
            )
        )
        print(report.table(args.results))
