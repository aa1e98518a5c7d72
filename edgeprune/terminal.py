"""The standard streams of a command: what is written there is ours, and plain text.

- Control characters, of a manifest, a checkpoint or an answer, are written as `\\x1b`.
- What libraries in C and Rust write to stderr by themselves is dropped: coloured logs, panics.
- A stream that was closed is there all the same, so that no file takes its number.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TextIO, cast

from edgeprune.errors import SpecError

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""All but line feeds and tabs; what turns the direction of text round is among them."""


def printable(text: str) -> str:
    """A text whose control characters are shown as escapes, lines and tabs left as they are."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def note(text: str) -> None:
    """A line, or some, for people, beside what stdout takes; lost where stderr is full."""
    with suppress(OSError):
        print(printable(text), file=sys.stderr, flush=True)


class Printable:
    """A stream that takes printable text alone, in whatever encoding it has."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        encoding = self._stream.encoding or "utf-8"
        plain = printable(text).encode(encoding, "backslashreplace").decode(encoding)
        with _refused():
            return self._stream.write(plain)

    def flush(self) -> None:
        with _refused():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def plain_streams(*, native: bool) -> Iterator[None]:
    """Standard streams as above while a command runs; with `native` libraries may write too."""
    _open_closed_ones()
    with ExitStack() as stack:
        if not native:
            stack.enter_context(_without_native_output())
        shown, sys.stdout = sys.stdout, cast(TextIO, Printable(sys.stdout))
        stack.callback(setattr, sys, "stdout", shown)
        yield


def _open_closed_ones() -> None:
    """Give 0, 1 and 2 back to the standard streams where nobody has them."""
    for number in range(3):
        with suppress(OSError):
            os.fstat(number)
            continue
        os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    if sys.stdout is None:
        raise SpecError(
            "stdout is closed, where the answer goes; send it to a file or to /dev/null"
        )


@contextmanager
def _without_native_output() -> Iterator[None]:
    """Point number 2 nowhere; what Python prints to stderr goes where that was.

    Warnings of Python's libraries, for programmers, are dropped; where they are errors, they are.
    """
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    ours, show = sys.stderr, warnings.showwarning
    with ExitStack() as stack:
        if _number(ours) == 2:
            sys.stderr = stack.enter_context(
                open(os.dup(2), "w", encoding=ours.encoding, errors=ours.errors, buffering=1)  # noqa: PTH123
            )
        os.dup2(nowhere, 2)
        warnings.showwarning = lambda *_, **__: None
        try:
            yield
        finally:
            sys.stderr, warnings.showwarning = ours, show
            os.dup2(kept, 2)
            os.close(kept)
            os.close(nowhere)


def _number(stream: TextIO) -> int | None:
    with suppress(OSError, ValueError):
        return stream.fileno()
    return None


@contextmanager
def _refused() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:  # the reader has gone, which is no fault
        raise
    except OSError as error:
        raise SpecError(f"stdout cannot be written ({error.strerror}); make room there") from error
