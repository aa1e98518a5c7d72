"""SIGHUP, which asks for bundles that changed: heard from the first moment on.

Its default action ends a process, and opening bundles takes a while.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager


class Hangups:
    """What comes before `listen` is remembered, and told then, once."""

    def __init__(self) -> None:
        self._pending = False
        self._tell: Callable[[], object] | None = None

    def listen(self, tell: Callable[[], object]) -> None:
        """Call `tell` at each signal from now on; it runs in the main thread, between any two of
        its instructions."""
        self._tell = tell
        if self._pending:
            tell()

    def ignore(self) -> None:
        """Listen no more: what is served stays as it is."""
        self._tell = _nothing

    def heard(self, *_: object) -> None:
        if self._tell is None:
            self._pending = True
        else:
            self._tell()


def _nothing() -> None:
    pass


@contextmanager
def hangups() -> Iterator[Hangups]:
    """In this block SIGHUP does not end the process; where there is none, nothing is heard."""
    found = Hangups()
    with ExitStack() as stack:
        if sys.platform != "win32":
            before = signal.signal(signal.SIGHUP, found.heard)
            stack.callback(signal.signal, signal.SIGHUP, before)
        yield found
