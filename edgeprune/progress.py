"""Progress: reports of long work, and a bar on stderr where somebody watches."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

Progress = Callable[[str, int, int], None]
"""Told the step, how much of it is done, and how much there is."""


def silent(step: str, done: int, total: int) -> None:
    """Tell nobody."""


SOON = 2.0
"""Seconds of a step before its time left is said: the first pieces of work take longer."""


class Bar:
    """One line, rewritten: `parity [#####.....] 4/8, 1:20 left`."""

    def __init__(
        self,
        stream: TextIO | None = None,
        width: int = 24,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stream, self.clock = stream or sys.stderr, clock
        self.shown, self.width, self.line = self.stream.isatty(), width, ""
        self.step, self.first, self.began = "", 0, 0.0  # where the step was when it was first told

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def __call__(self, step: str, done: int, total: int) -> None:
        if not self.shown:
            return
        filled = self.width * done // max(total, 1)
        bar = "#" * filled + "." * (self.width - filled)
        line = f"{step:<26} [{bar}] {done}/{total}{self._left(step, done, total)}"
        self.stream.write("\r" + line.ljust(len(self.line)))
        self.stream.flush()
        self.line = line

    def _left(self, step: str, done: int, total: int) -> str:
        """How long the step still takes at the speed so far; work that was done before it began,
        as by an earlier run, counts for nothing."""
        now = self.clock()
        if step != self.step or done < self.first:
            self.step, self.first, self.began = step, done, now
        took, did = now - self.began, done - self.first
        if took < SOON or not did or done >= total:
            return ""
        return f", {_duration(took / did * (total - done))} left"

    def clear(self) -> None:
        """Wipe the bar, so that what is printed next starts a clean line."""
        if self.line:
            self.stream.write("\r" + " " * len(self.line) + "\r")
            self.stream.flush()
            self.line = ""


def _duration(seconds: float) -> str:
    """`0:07`, `12:30`, or `3:05:00`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
