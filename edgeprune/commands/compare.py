"""`edgeprune compare`: methods and ratios side by side, right answers and time."""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune import terminal
from edgeprune.commands import _common
from edgeprune.errors import SpecError

if TYPE_CHECKING:
    from edgeprune.compare.comparing import CompareRequest
    from edgeprune.compare.results import Comparison


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "compare",
        help="measure methods and ratios side by side",
        description="Export every method at every ratio, ask each bundle the same questions, time"
        " them all in one run, and write tables and a figure. A run that was stopped goes on where"
        " it was; what is finished is not done again.",
    )
    _common.add_model(command)
    command.add_argument(
        "--methods",
        default="all",
        help="methods with commas between, or all (default); with options, as"
        " utp:ure=off:position=start",
    )
    command.add_argument(
        "--cr", default="2,4,8,16", metavar="LIST", help="ratios (default 2,4,8,16)"
    )
    command.add_argument(
        "--weights",
        default="float",
        metavar="LIST",
        help="formats to compare too, with commas between, as float,int8,int4:block=64 (default"
        " float)",
    )
    command.add_argument(
        "--tiles",
        default="all",
        metavar="LIST",
        help="numbers of encoded tiles of an image to compare too, with commas between, as"
        " all,4,2 (default all)",
    )
    command.add_argument(
        "--seeds",
        type=int,
        default=5,
        metavar="N",
        help="seeds of methods that choose at random (default 5)",
    )
    command.add_argument(
        "--questions",
        type=int,
        metavar="N",
        help="number of questions (default: 2400 of the demo, or all)",
    )
    command.add_argument(
        "--questions-file",
        type=Path,
        metavar="FILE",
        help="your own questions, JSONL: image, question, answer, and kind if you like",
    )
    command.add_argument(
        "--questions-image-dir",
        type=Path,
        metavar="DIR",
        help="where its images are (default: beside it)",
    )
    command.add_argument(
        "--samples-file",
        type=Path,
        metavar="FILE",
        help="calibration samples: LLaVA-Instruct JSON or JSONL",
    )
    command.add_argument(
        "--image-dir", type=Path, metavar="DIR", help="where its images are (default: beside it)"
    )
    _common.add_execution(command)
    command.add_argument(
        "--max-new-tokens", type=int, default=32, metavar="N", help="longest answer (default 32)"
    )
    command.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="processes, each with a float32 model in memory (default: one a core; on Ray one a"
        " core of the cluster)",
    )
    _common.add_ray(command, "cells")
    command.add_argument(
        "--rounds", type=int, default=20, metavar="N", help="rounds of timing; 0: none (default 20)"
    )
    command.add_argument("--backend", default="ort-cpu", help="ort-cpu (default) or ort-cuda")
    command.add_argument("--dtype", help="fp32 (default) or fp16")
    command.add_argument("--keep-bundles", action="store_true", help="do not delete the bundles")
    command.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="folder of results and figure",
    )
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from edgeprune.compare.comparing import compare
    from edgeprune.progress import Bar

    request = _request(args)
    len(request.evaluation.questions)  # a wrong file or folder is refused now
    _common.check_output(args.output / "compare.json")
    with Bar() as bar:
        comparison = compare(request, bar, partial(_common.tell, bar))
    written = _write(comparison, args.output)
    print(comparison.to_markdown(), end="")
    terminal.note(f"written: {', '.join(map(str, written))}")
    if comparison.failed:
        raise SpecError(
            f"{len(comparison.failed)} of {len(request.cells)} cells failed, the others are"
            " written; run the same command to try these again"
        )
    return 0


def _request(args: argparse.Namespace) -> CompareRequest:
    from edgeprune.compare.answers import EvalRequest
    from edgeprune.compare.cells import grid
    from edgeprune.compare.comparing import CompareRequest
    from edgeprune.compare.questions import Questions
    from edgeprune.compare.timing import TimingRequest
    from edgeprune.lowering import resolve
    from edgeprune.recipe import Recipe
    from edgeprune.runtime import backends
    from edgeprune.spec import PruneSpec

    recipe = Recipe(
        PruneSpec("none"),
        model=args.model,
        revision=args.revision,
        tokenizer=args.tokenizer,
        image_size=args.image_size,
        dtype=args.dtype,
        device=args.device,
        reference_dtype=args.reference_dtype,
        parity=4,
        samples_file=args.samples_file,
        image_dir=args.image_dir,
    )
    _common.execution(args, elsewhere=args.ray is not None)
    dtype = resolve(recipe.target, recipe.dtype).dtype.name  # refuses what it does not know
    if dtype not in (runs := backends.find(args.backend).dtypes):
        raise SpecError(
            f"{args.backend} runs {', '.join(runs)}, not {dtype}; choose another --dtype"
        )
    questions = Questions(args.questions, args.questions_file, args.questions_image_dir)
    return CompareRequest(
        folder=args.output,
        cells=tuple(grid(*_axes(args))),
        recipe=recipe,
        evaluation=EvalRequest(questions, args.backend, args.max_new_tokens),
        timing=TimingRequest(args.backend, args.rounds) if args.rounds else None,
        jobs=args.jobs or os.cpu_count() or 1,
        keep_bundles=args.keep_bundles,
        cluster=_common.cluster(args),
    )


def _axes(
    args: argparse.Namespace,
) -> tuple[list[str], list[float], int, list[str], list[int | None]]:
    methods, weights = args.methods.split(","), args.weights.split(",")
    return methods, _ratios(args.cr), args.seeds, weights, _tiles(args.tiles)


def _tiles(text: str) -> list[int | None]:
    try:
        return [None if part.strip() == "all" else int(part) for part in text.split(",")]
    except ValueError as error:
        raise SpecError(
            f"--tiles takes numbers or all with commas between, as all,4,2; got {text!r}"
        ) from error


def _ratios(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise SpecError(
            f"--cr takes numbers with commas between, as 2,4,8; got {text!r}"
        ) from error


def _write(comparison: Comparison, folder: Path) -> list[Path]:
    from edgeprune.compare.figure import figure
    from edgeprune.drawing.image_files import save
    from edgeprune.files import write_whole

    texts = {
        "compare.json": comparison.to_json(),
        "compare.csv": comparison.to_csv(),
        "compare.md": comparison.to_markdown(),
    }
    for name, text in texts.items():
        write_whole(folder / name, text.encode())
    written = [folder / name for name in texts]
    if comparison.cells:
        sheet = figure(comparison)
        for name in ("compare.png", "compare.svg"):
            save(sheet, folder / name)
            written.append(folder / name)
    return written
