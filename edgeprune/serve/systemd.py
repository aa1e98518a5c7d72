"""What systemd is told of a service with `Type=notify`: ready, stopping, and still at work.

The protocol is a datagram to the socket that NOTIFY_SOCKET names (sd_notify(3)). Elsewhere nothing
is sent.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from contextlib import suppress


def notify(state: str) -> None:
    """Send `READY=1` or the like; nothing where no systemd listens."""
    if (address := os.environ.get("NOTIFY_SOCKET", "")) and hasattr(socket, "AF_UNIX"):
        name = "\0" + address[1:] if address.startswith("@") else address
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(state.encode(), name)


def watchdog_seconds() -> float | None:
    """After so long without a sign systemd starts the service again; None where it does not."""
    text, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not text.isdigit() or (pid and pid != str(os.getpid())):
        return None
    return int(text) / 1e6


async def watch(longest_step: Callable[[], float]) -> None:
    """Give a sign twice in the time of the watchdog, as long as no call of an engine takes longer
    than that time: a device that hangs never comes back by itself."""
    if (seconds := watchdog_seconds()) is None:
        return
    while True:
        if longest_step() < seconds:
            notify("WATCHDOG=1")
        await asyncio.sleep(seconds / 2)
