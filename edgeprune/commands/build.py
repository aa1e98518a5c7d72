"""`edgeprune build`: compile a bundle into TensorRT engines."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune import terminal
from edgeprune.graph_contract import WEIGHTS

if TYPE_CHECKING:
    from edgeprune.runtime.build import Built


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "build",
        help="compile a bundle into TensorRT engines",
        description="Compile a bundle's graphs with TensorRT, on the device that will run them, or"
        " with TensorRT-RTX, for which no GPU is needed. The engines' folder goes to stdout.",
    )
    command.add_argument("bundle", type=Path, metavar="BUNDLE", help="exported folder")
    command.add_argument(
        "--backend", choices=("trt", "trt-rtx"), help="default: the one that is installed"
    )
    command.add_argument(
        "--text-capacity",
        type=int,
        default=512,
        metavar="N",
        help="text tokens that the caches hold, prompts and answers together (default 512)",
    )
    command.add_argument(
        "--compute",
        action="append",
        default=[],
        metavar="SMxx",
        help="GPU generation to build for, such as SM89; may be given again (trt-rtx only;"
        " default: TensorRT-RTX chooses)",
    )
    command.add_argument("--force", action="store_true", help="build again where engines are there")
    command.add_argument(
        "--drop-weights",
        action="store_true",
        help="remove the bundle's weights.bin once the engines are built: they hold the weights;"
        " other engines then need a copy of the bundle",
    )
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from edgeprune.progress import Bar
    from edgeprune.runtime import trt
    from edgeprune.runtime.build import BuildRequest, build

    request = BuildRequest(
        bundle=args.bundle,
        backend=trt.installed() if args.backend is None else args.backend,
        text_capacity=args.text_capacity,
        compute=tuple(dict.fromkeys(name.upper() for name in args.compute)),
        force=args.force,
        drop_weights=args.drop_weights,
    )
    with Bar() as bar:
        built = build(request, bar)
    terminal.note(_summary(built))
    if args.drop_weights:
        terminal.note(f"{args.bundle / WEIGHTS} is removed; these engines hold the weights")
    print(built.path)
    return 0


def _summary(built: Built) -> str:
    record = built.record
    lines = [
        f"{engine['file']} {engine['bytes'] / 1e6:.2f} MB, {engine['seconds']:.1f} s"
        for engine in record["engines"].values()
    ]
    head = f"{record['backend']} {record['version']}, {record['dtype']}"
    if built.found:
        head += "; built before and unaltered (--force builds again)"
    capacity = f"caches hold the image and {record['text_capacity']} tokens of text"
    return "\n".join([head, *lines, capacity])
