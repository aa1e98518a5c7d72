"""`edgeprune show`: draw what pruning leaves of an image."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune import terminal
from edgeprune.commands import _common
from edgeprune.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

    from edgeprune.manifest import Manifest
    from edgeprune.runtime.answer import Answer


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "show",
        help="draw what pruning leaves of an image",
        description="Ask a bundle about an image and draw the answer, the visual tokens alive"
        " after each pruning site, and the token count of each layer.",
    )
    command.add_argument("bundle", type=Path, metavar="BUNDLE", help="exported folder")
    command.add_argument("--image", required=True, type=Path, help="image file")
    command.add_argument("--prompt", required=True, help="question")
    command.add_argument(
        "-o",
        "--output",
        required=True,
        type=Path,
        metavar="FILE",
        help="figure: a .png, .jpg, .webp or .svg",
    )
    command.add_argument(
        "--dense", type=Path, metavar="BUNDLE", help="bundle whose answer is drawn beside it"
    )
    command.add_argument(
        "--scale",
        type=int,
        default=1,
        choices=(1, 2, 3, 4),
        help="size, times 1200 pixels (default 1)",
    )
    command.add_argument(
        "--font", type=Path, metavar="FILE", help="font for other letters than English (.ttf, .otf)"
    )
    command.add_argument(
        "--backend", default="ort-cpu", help="ort-cpu (default), ort-cuda, trt, trt-rtx"
    )
    command.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    _common.add_ratio(command)
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from edgeprune.drawing import image_files, show
    from edgeprune.drawing.canvas import check_font
    from edgeprune.drawing.show_figure import figure
    from edgeprune.images import read_image
    from edgeprune.runtime.survivors import drawn, seen, survivors

    image_files.check_target(args.output)
    check_font(args.font)
    read = read_image(args.image)
    image = read.image
    for bundle in filter(None, (args.bundle, args.dense)):
        _check_kind(bundle)
    _common.check_output(args.output)

    manifest, answer = _ask(args.bundle, image, args, args.cr)
    said = [show.Caption.by(manifest, answer)]
    if args.dense:
        said.append(show.Caption.by(*_ask(args.dense, image, args)))
    levels, sites = seen(image, manifest.image), survivors(answer, manifest)
    prune = replace(manifest.prune, grid=drawn(manifest))
    sheet = figure(levels, sites, prune, args.prompt, said, font=args.font)
    image_files.save(sheet, args.output, args.scale)
    for note in (*read.warnings, *answer.warnings):
        terminal.note(f"note: {note}")
    print(args.output)
    return 0


def _check_kind(bundle: Path) -> None:
    """InputError where a bundle takes something else than one image."""
    from edgeprune.bundle import Bundle
    from edgeprune.runtime.survivors import can_be_drawn

    manifest = Bundle.open(bundle, verify=False).manifest
    record = manifest.image
    if record.frames is not None or record.images != 1:
        takes = "a video" if record.frames is not None else f"{record.images} images"
        raise InputError(f"show draws one image, {bundle} takes {takes}; ask it: edgeprune run")
    if not can_be_drawn(manifest):
        raise InputError(f"show draws patches, visual tokens of {bundle} are no rectangle of them")


def _ask(
    bundle: Path, image: Image, args: argparse.Namespace, cr: float | None = None
) -> tuple[Manifest, Answer]:
    """What a bundle is and what it answers; it is closed again, the next may need the memory."""
    from edgeprune.runtime import Session

    with Session.open(bundle, backend=args.backend, threads=args.threads) as session:
        answer = session.ask(image, args.prompt, cr=cr)
        return session.manifest, answer
