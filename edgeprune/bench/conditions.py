"""What a machine is, and its heat and clocks under load, from files of Linux and from NVML.

A Jetson shows its zones and the clock of its GPU as files too. What a machine does not tell is
None, and no guess.
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

from edgeprune.bench.power import Nvml, nvml
from edgeprune.records import Between
from edgeprune.runtime import machine

SLOWDOWNS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "thermal (software)",
    0x40: "thermal (hardware)",
    0x80: "power brake",
}
"""Bits of nvmlDeviceGetCurrentClocksThrottleReasons that are no choice of the user's."""

Celsius = Annotated[float, Between(-100, 1000)]
Megahertz = Annotated[float, Between(0, 1e6)]


@dataclass(frozen=True, slots=True)
class Conditions:
    """Of one moment: the hottest zone, clocks, and what slows the machine down now."""

    celsius: Celsius | None
    cpu_mhz: Megahertz | None  # the mean of all processors
    gpu_mhz: Megahertz | None
    slowed: tuple[str, ...] = ()


class Observer:
    """Looks at one machine; a card is asked where it runs what is timed."""

    def __init__(self, gpu: bool, root: Path = Path("/"), card: Nvml | None = None) -> None:
        self._root, self._events = root, _events(root)
        self._card = card or (nvml() if gpu else None)

    def look(self) -> Conditions:
        system, card = self._root / "sys", self._card
        zones = _numbers((system / "class" / "thermal").glob("thermal_zone*/temp"))
        cpus = system / "devices" / "system" / "cpu"
        clocks = _numbers(cpus.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
        gpus = _numbers((system / "class" / "devfreq").glob("*gpu*/cur_freq"))
        hottest = [zone / 1e3 for zone in zones]
        gpu_mhz, slowed = max(gpus) / 1e6 if gpus else None, list[str]()
        if card is not None:
            with suppress(OSError, AttributeError):  # an old driver lacks a call
                hottest.append(card.celsius())
            with suppress(OSError, AttributeError):
                gpu_mhz = card.megahertz()
            with suppress(OSError, AttributeError):
                reasons = card.slowdowns()
                slowed += [name for bit, name in SLOWDOWNS.items() if reasons & bit]
        if (events := _events(self._root)) > self._events:
            slowed.append("CPU thermal")
            self._events = events
        return Conditions(
            celsius=max(hottest, default=None),
            cpu_mhz=statistics.fmean(clocks) / 1e3 if clocks else None,
            gpu_mhz=gpu_mhz,
            slowed=tuple(slowed),
        )


def power_mode(root: Path = Path("/")) -> str:
    """A Jetson's power mode, or the governor of the first CPU; `unknown` where neither is told."""
    for name in ("var/lib/nvpmodel/status", "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"):
        file = root / name
        if file.is_file():
            return file.read_text(encoding="utf-8", errors="replace").strip()[:80]
    return "unknown"


def machine_versions() -> dict[str, str]:
    """Processor, GPU, power mode and versions of what runs here."""
    found = machine.describe()
    named = {
        "gpu": found.gpu.name if found.gpu else "",
        "jetson": found.jetson,
        "power": power_mode(),
    }
    engines = {name: v for name, v in found.versions.items() if name not in ("torch", "onnx")}
    return {
        "processor": _processor(),
        "system": found.system,
        "python": platform.python_version(),
        **{name: value for name, value in named.items() if value},
        **engines,
        **{name: version(name) for name in ("edgeprune", "numpy")},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} threads" if names else platform.processor() or "unknown"


def _events(root: Path) -> float:
    """How often x86 processors were slowed down for heat since the machine started."""
    cpus = root / "sys" / "devices" / "system" / "cpu"
    return sum(_numbers(cpus.glob("cpu[0-9]*/thermal_throttle/*_throttle_count")))


def _numbers(files: Iterable[Path]) -> list[float]:
    """Of each file its number; a sensor that does not answer is left out."""
    found = list[float]()
    for file in files:
        with suppress(OSError, ValueError):
            found.append(float(file.read_text()))
    return found
