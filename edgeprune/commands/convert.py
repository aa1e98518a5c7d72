"""`edgeprune convert`: pickled weights become safetensors."""

from __future__ import annotations

import argparse
from pathlib import Path

from edgeprune import terminal


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "convert",
        help="write a checkpoint's pickled weights (.bin) as safetensors",
        description="Write a checkpoint whose weights are pickles (pytorch_model*.bin) anew with"
        " safetensors, which is all that export reads. Pickles are read weights-only: a file that"
        " holds anything but tensors is refused, and nothing of it is run.",
    )
    command.add_argument("folder", type=Path, metavar="FOLDER", help="the checkpoint")
    command.add_argument(
        "-o", "--output", type=Path, help="a new folder (default FOLDER-safetensors)"
    )
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from edgeprune.models._pickled import convert
    from edgeprune.progress import Bar

    folder: Path = args.folder
    output = args.output or folder.absolute().with_name(f"{folder.absolute().name}-safetensors")
    with Bar() as bar:
        made = convert(folder, output, bar)
    terminal.note(
        f"{made.tensors} tensors of {made.files} files, {made.bytes / 1e6:,.1f} MB; the pickles"
        " were read weights-only, no code of the checkpoint was run"
    )
    print(made.folder)
    return 0
