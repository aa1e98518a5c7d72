"""The command line: parse, call one function, print. Every layer is imported when it is needed.

Answers go to stdout, timings and progress to stderr. An error of ours is one line and exit code 2;
EDGEPRUNE_DEBUG=1 shows the traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from edgeprune import __version__
from edgeprune.commands import bench, calibrate, export, listing, run
from edgeprune.errors import EdgepruneError

DEBUG = "EDGEPRUNE_DEBUG"


def parser() -> argparse.ArgumentParser:
    """The whole command line; needs nothing but the standard library."""
    top = argparse.ArgumentParser(
        prog="edgeprune",
        description="Prune visual tokens of a vision-language model, freeze it into static ONNX,"
        " run it on the edge.",
    )
    top.add_argument("--version", action="version", version=f"edgeprune {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (export, run, bench, calibrate, listing):
        module.add(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0, or 2 after an error of ours, or 130 when interrupted."""
    args = parser().parse_args(argv)
    try:
        code: int = args.run(args)
        return code
    except EdgepruneError as error:
        if os.environ.get(DEBUG):
            raise
        print(f"edgeprune: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("edgeprune: interrupted; nothing half-written is left", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout has gone: `edgeprune ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def path(text: str) -> Path:
    """A path argument, ~ expanded."""
    return Path(text).expanduser()


if __name__ == "__main__":
    sys.exit(main())
