"""The machine's memory, where it says."""

from __future__ import annotations

from pathlib import Path


def available_bytes() -> int | None:
    """Bytes that this machine can still give; None where it does not say (Linux does)."""
    return _meminfo("MemAvailable")


def total_bytes() -> int | None:
    """Bytes of memory that this machine has; None where it does not say (Linux does)."""
    return _meminfo("MemTotal")


def _meminfo(field: str) -> int | None:
    info = Path("/proc/meminfo")
    if not info.is_file():
        return None
    for line in info.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    return None
