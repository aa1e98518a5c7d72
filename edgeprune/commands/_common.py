"""Options that several commands share."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune import terminal
from edgeprune.errors import SpecError, brief
from edgeprune.files import obstacle, real, unwritable, write_whole
from edgeprune.tiling import TILE_MEMORY_MB, Size

if TYPE_CHECKING:
    from edgeprune.calib.calibrate import CalibrationRequest
    from edgeprune.cluster import Cluster
    from edgeprune.models import Adapter
    from edgeprune.models._execution import Execution
    from edgeprune.progress import Bar
    from edgeprune.runtime.formats import AnswerFormat
    from edgeprune.spec import PruneSpec


AUTO = "auto"
"""What --method says where encoder and decoder are chosen together."""
JOINT = "utp"
"""The decoder's method then: the one whose counts are solved for."""


def add_model(command: argparse.ArgumentParser, default: str | None = "demo") -> None:
    said = " (default)" if default == "demo" else ""
    command.add_argument(
        "--model", default=default, help=f"checkpoint folder, hub id, or demo{said}"
    )
    command.add_argument("--revision", help="hub revision of the checkpoint")
    command.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FOLDER",
        help="folder of a tokenizer, for a checkpoint without one (CogVLM: Vicuna's)",
    )
    command.add_argument(
        "--image-size",
        type=image_size,
        metavar="WxH",
        help="pixels of the images to freeze for, where the family takes several sizes"
        " (Qwen-VL: multiples of 28, default 448x448)",
    )


def add_media(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--num-images", type=int, default=1, metavar="N", help="images in a prompt (default 1)"
    )
    command.add_argument(
        "--frames", type=int, metavar="N", help="freeze for a video of N frames, not for images"
    )
    command.add_argument(
        "--tiles",
        type=int,
        metavar="N",
        help="encode N tiles of an image and the view of the whole: those with the most unusual"
        " colours (InternVL, Gemma 3; default: all)",
    )


def add_tile_memory(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--tile-memory",
        type=int,
        default=TILE_MEMORY_MB,
        metavar="MB",
        help="memory for encoded tiles: a tile whose pixels come again is not encoded again; 0:"
        f" keep none (default {TILE_MEMORY_MB})",
    )


def check_model(args: argparse.Namespace, command: str) -> None:
    """SpecError where options about a model are given without one: they would do nothing."""
    given = {
        "--revision": args.revision is not None,
        "--tokenizer": args.tokenizer is not None,
        "--image-size": args.image_size is not None,
        "--num-images": args.num_images != 1,
        "--frames": args.frames is not None,
        "--tiles": args.tiles is not None,
    }
    options = [option for option, value in given.items() if value]
    if args.model is None and options:
        raise SpecError(
            f"{', '.join(options)} asks about a model; name it: edgeprune {command} --model M"
        )


def add_answer_format(command: argparse._ActionsContainer) -> None:
    command.add_argument(
        "--json-schema",
        type=Path,
        metavar="FILE",
        help="the answer is JSON that this schema allows; {} allows any",
    )
    command.add_argument(
        "--regex", metavar="PATTERN", help="the answer is text that this expression matches"
    )


def answer_format(args: argparse.Namespace) -> AnswerFormat | None:
    """The form of the answers that was asked for; SpecError where it cannot be read."""
    from edgeprune.runtime.formats import AnswerFormat

    if args.regex is not None:
        return AnswerFormat.regex(args.regex)
    if args.json_schema is None:
        return None
    try:
        return AnswerFormat.json_schema(json.loads(args.json_schema.read_text("utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise SpecError(
            f"--json-schema {args.json_schema} is no JSON file ({brief(error)})"
        ) from error


def image_size(text: str) -> Size:
    """`1344x672`, width before height."""
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"WIDTHxHEIGHT in pixels, such as 672x336; got {text!r}")
    return Size(int(height), int(width))


def ratios(text: str) -> tuple[float, ...]:
    """`4`, or `2,4,8`."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"a number, or numbers with commas between, such as 2,4,8; got {text!r}"
        ) from None


def add_ratio(command: argparse.ArgumentParser) -> None:
    """Which ratio of a bundle is asked."""
    command.add_argument(
        "--cr",
        type=float,
        help="compression ratio, of a bundle that was exported with several (default: its first)",
    )


def add_method(command: argparse.ArgumentParser, *, several: bool = False) -> None:
    command.add_argument("--method", default="utp", help="see: edgeprune methods (default utp)")
    many = "; several, such as 2,4,8, make a bundle that runs at each, at the first by default"
    command.add_argument(
        "--cr",
        type=ratios if several else float,
        help=f"compression ratio, 1 or more (default 4; 1 for none){many if several else ''}",
    )
    command.add_argument(
        "--seed", type=int, default=0, help="seed of methods that choose at random (default 0)"
    )
    command.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="option of the method"
    )


def add_calibration(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--samples", type=int, default=100, metavar="N", help="calibration samples (default 100)"
    )
    command.add_argument(
        "--samples-file",
        type=Path,
        metavar="FILE",
        help="calibration samples: LLaVA-Instruct JSON or JSONL",
    )
    command.add_argument(
        "--image-dir", type=Path, metavar="DIR", help="folder of its images (default: beside it)"
    )
    command.add_argument(
        "--solver",
        default="joint",
        choices=("joint", "exact", "paper"),
        help="how schedules are solved (default joint)",
    )
    command.add_argument(
        "--solve-seconds",
        type=float,
        metavar="S",
        help="time to search for a bound on the loss of any schedule (default: by problem size)",
    )
    command.add_argument(
        "--max-sites", type=int, metavar="N", help="drop tokens before N layers at most"
    )


def add_execution(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--device",
        default="cpu",
        help="where calibration and the eager model of the parity check run: cpu (default), cuda"
        " or cuda:N",
    )
    command.add_argument(
        "--reference-dtype",
        default="fp32",
        metavar="DTYPE",
        help="dtype of the model that is calibrated: fp32 (default), fp16 or bf16; scores are fp32",
    )


def execution(args: argparse.Namespace, *, elsewhere: bool = False) -> Execution:
    """Where the eager model computes; SpecError where it cannot, unless other machines will."""
    from edgeprune.models._execution import Execution

    found = Execution.parse(args.device, args.reference_dtype)
    if not elsewhere:
        found.require()
    return found


def add_ray(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument(
        "--ray",
        metavar="ADDRESS",
        help=f"spread {what} over a Ray cluster: its address, or auto (default: this machine)",
    )


def cluster(args: argparse.Namespace) -> Cluster | None:
    """The cluster of --ray, with --jobs at once; None where there is none."""
    from edgeprune.cluster import Cluster

    if args.jobs is not None and args.jobs < 1:
        raise SpecError(f"--jobs is at least 1; got {args.jobs}")
    return None if args.ray is None else Cluster(args.ray, args.jobs)


def spec(args: argparse.Namespace) -> PruneSpec:
    """The PruneSpec of parsed options, of `auto` its decoder's; --cr defaults to 4, and to 1 for
    the dense model and where counts are given."""
    from edgeprune.spec import PruneSpec

    options = {}
    for text in args.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise SpecError(f"--set takes NAME=VALUE; got {text!r}")
        if name in options:
            raise SpecError(f"--set gives {name} twice; give it once")
        options[name] = value
    method = JOINT if args.method == AUTO else args.method
    asked = PruneSpec(method, seed=args.seed, options=options)
    default = 1.0 if args.method == "none" or asked.exact else 4.0
    return replace(asked, cr=default if args.cr is None else args.cr)


def check_output(file: Path) -> None:
    """Make the folder of a result; SpecError, before anything slow, where it cannot be written."""
    if why := obstacle(file):
        raise unwritable(file, why)
    if file.is_dir():
        raise SpecError(f"the result goes to a file, {file} is a folder; name a file in it")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(file, error.strerror or str(error)) from error
    paths = [file] if file.exists() else []
    if file.is_file() or not paths:  # its draft lies beside it; a device has none
        paths.append(real(file).parent)
    if not all(os.access(path, os.W_OK) for path in paths):
        raise unwritable(file, "no permission")


def tell(bar: Bar, line: str) -> None:
    """Say something while a bar is drawn."""
    bar.clear()
    terminal.note(f"edgeprune: {line}")


def write_output(file: Path, text: str) -> None:
    """Write a result, the whole of it or nothing."""
    write_whole(file, text.encode())


def calibration(args: argparse.Namespace, cr: float) -> CalibrationRequest:
    from edgeprune.calib.calibrate import CalibrationRequest

    return CalibrationRequest(
        cr,
        args.samples,
        args.samples_file,
        args.image_dir,
        args.solver,
        args.max_sites,
        solve_seconds=args.solve_seconds,
    )


def model(args: argparse.Namespace) -> Adapter:
    from edgeprune.models import open_model

    return open_model(
        args.model,
        args.revision,
        size=args.image_size,
        images=args.num_images,
        frames=args.frames,
        tiles=args.tiles,
        tokenizer=args.tokenizer,
    )
