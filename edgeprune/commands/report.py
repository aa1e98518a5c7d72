"""`edgeprune report`: one page of HTML from bundles and results."""

from __future__ import annotations

import argparse
from datetime import datetime, timezone
from pathlib import Path

from edgeprune import terminal
from edgeprune.commands import _common


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "report",
        help="put bundles and results on one page",
        description="Write one HTML page about all bundles and all results of bench (--json),"
        " compare and lmms-eval below some folders: what was pruned, accuracy, times, memory,"
        " energy, parity, versions. The page needs no network and no other file.",
    )
    command.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folder to search")
    command.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="the page (.html)"
    )
    command.add_argument("--title", help="title of the page")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from edgeprune.report.page import Heading, render
    from edgeprune.report.sources import read

    _common.check_output(args.output)
    sources = read(args.folders)
    for one in sources.left_out:
        terminal.note(f"note: {one.name} is left out: {one.why}")
    date = datetime.now(timezone.utc).date().isoformat()
    heading = Heading(args.title, date) if args.title else Heading(date=date)
    _common.write_output(args.output, render(sources, heading))
    print(args.output)
    return 0
