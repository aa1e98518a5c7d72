"""Commands that go wrong in every way that has to be seen; no kind of a run."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.fuzz.case import Case
from tests.fuzz.seeds import Seeds


def make(rng: Random, seeds: Seeds, folder: Path) -> Case:
    (folder / "barred").touch()
    name = (seeds.folder / "trap").read_text()
    return Case(TRAPS[name], name, True, name == "taken", (folder / "barred",))


def _dies() -> int:
    os.kill(os.getpid(), signal.SIGSEGV)
    return 0


def _sleeps() -> int:
    time.sleep(60)
    return 0


def _fills_memory() -> int:
    """Where no limit catches it."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    held = b"x" * 2_300_000_000
    return 2 * (len(held) == 0)


def _asks_for_memory() -> int:
    """Where the limit catches it."""
    try:
        return len(b"x" * 2_300_000_000)
    except MemoryError:
        return _says("edgeprune: no memory\n")()


def _raises() -> int:
    raise KeyError("a bug")


def _starts() -> int:
    subprocess.run(["true"], check=True)
    return 0


def _opens() -> int:
    Path("barred").resolve().read_bytes()
    return 0


def _says(text: str, code: int = 2) -> Callable[[], int]:
    def run() -> int:
        sys.stderr.write(text)
        return code

    return run


TRAPS: dict[str, Callable[[], int]] = {
    "dies": _dies,
    "sleeps": _sleeps,
    "memory": _fills_memory,
    "limit": _asks_for_memory,
    "raises": _raises,
    "starts": _starts,
    "opens": _opens,
    "taken": lambda: 0,
    "two lines": _says("W: a library warns\nedgeprune: no\n"),
    "no line": _says(""),
    "escape": _says("edgeprune: \x1b[31mno\n"),
    "code": _says("edgeprune: no\n", 1),
    "right": _says("edgeprune: no such thing\n"),
}
