"""The command line: parse, call one function, print. Every layer is imported when it is needed.

Answers go to stdout, timings and progress to stderr. An error is one line and exit code 2;
EDGEPRUNE_DEBUG=1 shows the traceback above it.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from edgeprune import __version__
from edgeprune.commands import bench, build, calibrate, check, compare, export, listing, run, show
from edgeprune.errors import EdgepruneError
from edgeprune.hints import install

DEBUG = "EDGEPRUNE_DEBUG"

EXTRAS = {
    name: f"this command needs {name} to read checkpoints; {install('export')}"
    for name in ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "highspy")
}
"""What to say where a module is missing that the base install leaves out."""


class Parser(argparse.ArgumentParser):
    """Refuses a command line in one line, as everything else is refused."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"edgeprune: {' '.join(message.split())}; see: {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """The whole command line; needs nothing but the standard library."""
    top = Parser(
        prog="edgeprune",
        description="Prune visual tokens of a vision-language model, freeze it into static ONNX,"
        " run it on the edge.",
    )
    top.add_argument("--version", action="version", version=f"edgeprune {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (export, run, show, compare, check, build, bench, calibrate, listing):
        module.add(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0, or 2 after an error, or 130 when interrupted."""
    args = parser().parse_args(argv)
    with suppress(ValueError):  # not the main thread; else `kill` cleans up as Ctrl-C does
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code: int = args.run(args)
        print(end="", flush=True)  # what cannot be written is known now, not at exit
        return code
    except BrokenPipeError:  # the reader of stdout has gone: `edgeprune ... | head`
        return 0
    except KeyboardInterrupt:
        print("edgeprune: interrupted; nothing half-written is left", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        needed = (error.name or "").partition(".")[0]
        if needed not in EXTRAS or os.environ.get(DEBUG):
            raise
        print(f"edgeprune: {EXTRAS[needed]}", file=sys.stderr)
        return 2
    except (EdgepruneError, OSError, MemoryError) as error:
        if os.environ.get(DEBUG):
            traceback.print_exc()
        line = " ".join(str(error).split()) or type(error).__name__
        print(f"edgeprune: {line}", file=sys.stderr)
        return 2
    finally:
        _settle_output()


def _settle_output() -> None:
    """Write stdout out, or drop what it does not take: Python would fail over it at exit."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
