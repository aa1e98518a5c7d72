"""The machine's memory and this process's, where they say."""

from __future__ import annotations

from pathlib import Path


def available_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that this machine can still give; None where it does not say (Linux does)."""
    return _kilobytes(root / "proc" / "meminfo", "MemAvailable")


def total_bytes(root: Path = Path("/")) -> int | None:
    """Bytes of memory that this machine has; None where it does not say (Linux does)."""
    return _kilobytes(root / "proc" / "meminfo", "MemTotal")


def peak_bytes() -> int | None:
    """Bytes that this process had resident at most; None where the machine does not say (Linux
    does, and not by `ru_maxrss`, which a process inherits from the one that started it)."""
    return _kilobytes(Path("/proc/self/status"), "VmHWM")


def resident_bytes() -> int | None:
    """Bytes that this process has resident; None where the machine does not say (Linux does)."""
    return _kilobytes(Path("/proc/self/status"), "VmRSS")


def _kilobytes(file: Path, field: str) -> int | None:
    """One entry of a list of kilobytes, in bytes."""
    if not file.is_file():
        return None
    for line in file.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    return None
