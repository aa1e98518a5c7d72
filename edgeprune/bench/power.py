"""What a machine reports of power and memory while a bundle runs on it.

A Jetson has an INA3221 on its board, whose voltages and currents Linux shows as files; `tegrastats`
reads the same ones. An RTX card is asked through NVML, the driver's library. Other machines report
nothing of power.
"""

from __future__ import annotations

import ctypes
import statistics
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edgeprune import memory

PERIOD = 0.02  # seconds between two looks; the INA3221 measures about as often
WHOLE = "VDD_IN"  # the rail of a Jetson Orin NX or Nano that feeds all others


class Meter(Protocol):
    """Power and memory of one device, at the moment of asking."""

    @property
    def source(self) -> str:
        """Where they are from, for reports."""

    def watts(self) -> float: ...

    def used_bytes(self) -> int:
        """Memory in use, by all programs."""


@dataclass(frozen=True)
class Rail:
    """One channel of an INA3221."""

    name: str
    millivolts: Path
    milliamperes: Path

    def watts(self) -> float:
        return int(self.millivolts.read_text()) * int(self.milliamperes.read_text()) / 1e6


@dataclass(frozen=True)
class Board:
    """A Jetson's rails: the one that feeds all, or where there is none, all that are labelled."""

    rails: tuple[Rail, ...]
    root: Path

    @property
    def source(self) -> str:
        return f"INA3221 ({', '.join(rail.name for rail in self.rails)})"

    def watts(self) -> float:
        return sum(rail.watts() for rail in self.rails)

    def used_bytes(self) -> int:
        """CPU and GPU share the memory."""
        total, free = memory.total_bytes(self.root), memory.available_bytes(self.root)
        return (total or 0) - (free or 0)


class Nvml:
    """The first NVIDIA card, by NVML."""

    source = "NVML"

    class _Memory(ctypes.Structure):
        _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]

    def __init__(self, library: Any) -> None:
        self.library, self.card = library, ctypes.c_void_p()
        self._call("nvmlInit_v2")
        self._call("nvmlDeviceGetHandleByIndex_v2", 0, ctypes.byref(self.card))
        self.watts()  # OSError now where the card does not report it
        self.used_bytes()

    def watts(self) -> float:
        found = ctypes.c_uint()
        self._call("nvmlDeviceGetPowerUsage", self.card, ctypes.byref(found))
        return found.value / 1e3

    def used_bytes(self) -> int:
        found = self._Memory()
        self._call("nvmlDeviceGetMemoryInfo", self.card, ctypes.byref(found))
        return int(found.used)

    def celsius(self) -> float:
        """Of the GPU itself."""
        found = ctypes.c_uint()
        self._call("nvmlDeviceGetTemperature", self.card, 0, ctypes.byref(found))
        return float(found.value)

    def megahertz(self) -> float:
        """The clock of its multiprocessors."""
        found = ctypes.c_uint()
        self._call("nvmlDeviceGetClockInfo", self.card, 1, ctypes.byref(found))
        return float(found.value)

    def slowdowns(self) -> int:
        """Bits that say why its clocks are lower than they could be."""
        found = ctypes.c_ulonglong()
        self._call("nvmlDeviceGetCurrentClocksThrottleReasons", self.card, ctypes.byref(found))
        return int(found.value)

    def _call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self.library, name)(*arguments):
            raise OSError(f"{name} returned {code}")


def find(gpu: bool, root: Path = Path("/")) -> Meter | None:
    """A meter of what runs a bundle, on a GPU or the CPU; None where the machine has none."""
    if rails := board_rails(root):
        board = Board(rails, root)
        with suppress(OSError):  # a sensor may be there and not answer
            board.watts()
            return board
    return nvml() if gpu else None


def board_rails(root: Path = Path("/")) -> tuple[Rail, ...]:
    """The rails of a Jetson's INA3221, as hwmon shows them."""
    found = []
    for label in sorted((root / "sys" / "class" / "hwmon").glob("hwmon*/in*_label")):
        chip = label.parent / "name"
        if not chip.is_file() or chip.read_text().strip() != "ina3221":
            continue
        name, number = label.read_text().strip(), label.name[2:].partition("_")[0]
        files = [label.parent / f"{kind}{number}_input" for kind in ("in", "curr")]
        if name not in ("NC", "sum of shunt voltages") and all(file.is_file() for file in files):
            found.append(Rail(name, *files))
    whole = [rail for rail in found if rail.name == WHOLE]
    return tuple(whole or found)


def nvml(load: Callable[[str], Any] = ctypes.CDLL) -> Nvml | None:
    """The card that NVML knows; None without a driver, or where it reports no power."""
    try:
        return Nvml(load("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"))
    except (OSError, AttributeError):
        return None


class Sampler:
    """Looks at a meter again and again, in a thread of its own, while a `with` block runs.

    A meter shows what all programs use. What comes and goes during the blocks is ours, what does
    between them is others'; so only one program may be in a block at a time.
    """

    def __init__(self, meter: Meter, period: float = PERIOD) -> None:
        self.meter, self.period = meter, period
        self.most_bytes = 0  # held at once
        self._held = self._others = 0
        self._watts: list[float] = []
        self._over = threading.Event()

    def __enter__(self) -> Sampler:
        self._watts.clear()
        self._over.clear()
        self._others = self.meter.used_bytes() - self._held
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._over.set()
        self._thread.join()
        self._held = self.meter.used_bytes() - self._others
        self.most_bytes = max(self.most_bytes, self._held)

    def watts(self) -> float | None:
        """The mean of the last block; None where the meter never answered."""
        return statistics.fmean(self._watts) if self._watts else None

    def _look(self) -> None:
        while True:
            with suppress(OSError):  # a look that fails is one less
                self._watts.append(self.meter.watts())
                self.most_bytes = max(self.most_bytes, self.meter.used_bytes() - self._others)
            if self._over.wait(self.period):
                return
