"""The command line: parse, call one function, print. Every layer is imported when it is needed.

Answers go to stdout, timings and progress to stderr. An error is one line and exit code 2;
EDGEPRUNE_DEBUG=1 shows the traceback above it.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from edgeprune import __version__, terminal
from edgeprune.commands import (
    bench,
    build,
    calibrate,
    check,
    compare,
    convert,
    export,
    listing,
    plan,
    profile,
    report,
    run,
    serve,
    show,
    watch,
)
from edgeprune.errors import EdgepruneError
from edgeprune.install_hints import install
from edgeprune.interrupts import interruptible

DEBUG = "EDGEPRUNE_DEBUG"

EXTRAS = (
    {
        name: f"this command needs {name} to read checkpoints; {install('export')}"
        for name in (
            "torch",
            "transformers",
            "onnx",
            "onnx_ir",
            "onnxscript",
            "safetensors",
            "highspy",
        )
    }
    | {
        name: f"this command needs {name} to answer over HTTP; {install('serve')}"
        for name in ("h11", "starlette", "uvicorn")
    }
    | {"ray": f"--ray needs ray; {install('ray')}, on every machine of the cluster"}
)
"""What to say where a module is missing that the base install leaves out."""


class Parser(argparse.ArgumentParser):
    """Refuses a command line in one line, as everything else is refused."""

    def error(self, message: str) -> NoReturn:
        text = terminal.printable(" ".join(message.split()))
        self.exit(2, f"edgeprune: {text}; see: {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """The whole command line; needs nothing but the standard library."""
    top = Parser(
        prog="edgeprune",
        description="Prune visual tokens of a vision-language model, freeze it into static ONNX,"
        " run it on the edge.",
    )
    top.add_argument("--version", action="version", version=f"edgeprune {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (
        export,
        run,
        serve,
        watch,
        show,
        compare,
        check,
        build,
        bench,
        profile,
        plan,
        report,
        calibrate,
        convert,
        listing,
    ):
        module.add(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0, or 2 after an error, or 130 when interrupted."""
    debug = bool(os.environ.get(DEBUG))
    try:
        with interruptible(), terminal.plain_streams(native=debug):
            return _run(argv)
    except BrokenPipeError:  # the reader of stdout has gone: `edgeprune ... | head`
        return 0
    except KeyboardInterrupt:
        terminal.note("edgeprune: interrupted; nothing half-written is left")
        return 130
    except ModuleNotFoundError as error:
        needed = (error.name or "").partition(".")[0]
        if needed not in EXTRAS or debug:
            raise
        terminal.note(f"edgeprune: {EXTRAS[needed]}")
        return 2
    except (EdgepruneError, OSError, MemoryError) as error:
        if debug:
            traceback.print_exc()
        terminal.note(f"edgeprune: {' '.join(str(error).split()) or type(error).__name__}")
        return 2


def _run(argv: Sequence[str] | None) -> int:
    try:
        args = _parsed(argv)
        code: int = args.run(args)
        print(end="", flush=True)  # what cannot be written is known now, not at exit
        return code
    finally:
        _settle_output()


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    top = parser()
    for argument in sys.argv[1:] if argv is None else argv:
        if "\0" in argument:
            top.error(f"{argument!r} holds a NUL character, which no path or text may")
        if re.fullmatch("(--[^=]+=|-[a-z]=?)--", argument):  # argparse makes a list of it
            top.error(f"{argument!r} gives an option no value")
    try:
        return top.parse_args(argv)
    except SystemExit:
        print(end="", flush=True)  # help that finds no room is an error too
        raise


def _settle_output() -> None:
    """Write stdout out, or drop what it does not take: Python would fail over it at exit."""
    try:
        print(end="", flush=True)
    except (EdgepruneError, OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
