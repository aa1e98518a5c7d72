"""Ctrl-C and `kill` end a command, whatever a library makes of them.

Python raises KeyboardInterrupt in the code that runs just then. Where that code was called by a
library of C or Rust, the library may give back an error of its own in its place: safetensors was
seen to say that it "could not determine the shape of object type UntypedStorage". So it is noted
that a signal came, and the error that ends the command after it is an interrupt.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

NUMBERS = signal.SIGINT, signal.SIGTERM

AGAIN = 0.1
"""Seconds after which an interrupt that was lost is raised again."""


@contextmanager
def interruptible() -> Iterator[None]:
    """In this block Ctrl-C and `kill` raise KeyboardInterrupt, and it leaves the block as that.

    Signals that are ignored stay so. Only the main thread hears signals; in others nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: int | None = None  # the signal that came
    timers = list[threading.Timer]()

    def end(number: int, frame: FrameType | None) -> NoReturn:
        nonlocal received
        received = number
        raise KeyboardInterrupt

    def dropped(unraisable: sys.UnraisableHookArgs) -> None:
        """An interrupt in a finalizer goes nowhere: it comes again, outside."""
        if unraisable.exc_type is KeyboardInterrupt and received is not None:
            timers.append(threading.Timer(AGAIN, _send, [received]))
            timers[-1].start()
        else:
            shown(unraisable)

    heard = [n for n in NUMBERS if signal.getsignal(n) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, end) for number in heard}
    shown, sys.unraisablehook = sys.unraisablehook, dropped
    try:
        yield
    except Exception as error:
        if received is not None:
            raise KeyboardInterrupt from error
        raise
    finally:
        for timer in timers:
            timer.cancel()
        sys.unraisablehook = shown
        for number, handler in before.items():
            signal.signal(number, handler)


def _send(number: int) -> None:
    """Give the main thread a signal, asleep or not."""
    if sys.platform == "win32":
        signal.raise_signal(number)
    elif (main := threading.main_thread().ident) is not None:
        signal.pthread_kill(main, number)
