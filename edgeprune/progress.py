"""Progress: reports of long work, and a bar on stderr where somebody watches."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TextIO

Progress = Callable[[str, int, int], None]
"""Told the step, how much of it is done, and how much there is."""


def silent(step: str, done: int, total: int) -> None:
    """Tell nobody."""


class Bar:
    """One line, rewritten: `parity [#####.....] 4/8`."""

    def __init__(self, stream: TextIO | None = None, width: int = 24) -> None:
        self.stream = stream or sys.stderr
        self.shown, self.width, self.line = self.stream.isatty(), width, ""

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def __call__(self, step: str, done: int, total: int) -> None:
        if not self.shown:
            return
        filled = self.width * done // max(total, 1)
        bar = "#" * filled + "." * (self.width - filled)
        line = f"{step:<26} [{bar}] {done}/{total}"
        self.stream.write("\r" + line.ljust(len(self.line)))
        self.stream.flush()
        self.line = line

    def clear(self) -> None:
        """Wipe the bar, so that what is printed next starts a clean line."""
        if self.line:
            self.stream.write("\r" + " " * len(self.line) + "\r")
            self.stream.flush()
            self.line = ""
