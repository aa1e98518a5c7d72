"""What this machine is, and what can be built and run on it, or what to install for that.

GPU and driver are asked through the driver's own library, so nothing needs to be installed for it.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune import memory
from edgeprune.install_hints import CUDA_PYTHON, install

JETPACKS = {
    "36.3.0": "6.0",
    "36.4.0": "6.1",
    "36.4.3": "6.2",
    "36.4.4": "6.2.1",
    "36.5.0": "6.2.2",
    "38.2.0": "7.0",
    "38.2.1": "7.0",
    "38.4.0": "7.1",
}
"""JetPack of each Jetson Linux release that is known here; NVIDIA's JetPack archive lists them."""
PACKAGES = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt": ("tensorrt",),
    "tensorrt_rtx": ("tensorrt-rtx",),
    "cuda": ("cuda-bindings", "cuda-python"),
    "torch": ("torch",),
    "onnx": ("onnx",),
}
"""Distributions that bring a module, likeliest first."""

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_...


@dataclass(frozen=True)
class Gpu:
    """The first NVIDIA GPU, as its driver describes it."""

    name: str
    compute: str  # such as sm_87
    bytes: int
    driver: str  # the newest CUDA that the driver runs, such as 12.6


@dataclass(frozen=True)
class Ability:
    """Something that edgeprune does, whether it can be done here, and why or what to install."""

    what: str
    possible: bool
    why: str = ""


@dataclass(frozen=True)
class Machine:
    """All that decides what can be done here."""

    system: str
    bytes: int | None  # of memory
    gpu: Gpu | None
    jetson: str  # Jetson Linux release, such as 36.4.3; empty elsewhere
    versions: dict[str, str]  # of the modules in PACKAGES that are there
    providers: tuple[str, ...]  # of ONNX Runtime

    @property
    def jetpack(self) -> str:
        """What a Jetson runs, in words."""
        if not self.jetson:
            return "no Jetson"
        known = JETPACKS.get(self.jetson)
        return f"{f'JetPack {known}, ' if known else ''}Jetson Linux {self.jetson}"

    def abilities(self) -> Iterator[Ability]:
        yield self._needs("export", ("torch", "onnx"), "export")
        yield self._needs("run on ort-cpu", ("onnxruntime",), "cpu")
        cuda = "CUDAExecutionProvider" in self.providers
        yield Ability(
            "run on ort-cuda",
            cuda and self.gpu is not None,
            "" if cuda and self.gpu else self._no_gpu() or install("gpu"),
        )
        for backend, module in (("trt", "tensorrt"), ("trt-rtx", "tensorrt_rtx")):
            build = self._needs(f"build with {backend}", (module,), backend)
            if backend == "trt" and build.possible and self.gpu is None:
                build = Ability(build.what, False, self._no_gpu())
            yield build
            why = self._no_gpu() or self._needs("", (module, "cuda"), backend).why
            if backend == "trt-rtx" and self.jetson:
                why = "TensorRT-RTX is for RTX cards, a Jetson runs trt"
            yield Ability(f"run on {backend}", not why, why)

    def _needs(self, what: str, modules: tuple[str, ...], extra: str) -> Ability:
        missing = [module for module in modules if module not in self.versions]
        return Ability(what, not missing, _install(extra, self.jetson) if missing else "")

    def _no_gpu(self) -> str:
        return "" if self.gpu else "no NVIDIA GPU, or no driver for it"


def describe(root: Path = Path("/")) -> Machine:
    """This machine; `root` is where its files are looked for."""
    versions = {m: v for m, names in PACKAGES.items() if (v := _version(names))}
    return Machine(
        platform.platform(),
        memory.total_bytes(root),
        gpu(),
        jetson(root),
        versions,
        _providers() if "onnxruntime" in versions else (),
    )


def jetson(root: Path = Path("/")) -> str:
    """The Jetson Linux release that /etc/nv_tegra_release names, such as 36.4.3, or nothing."""
    file = root / "etc" / "nv_tegra_release"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    found = re.search(r"R(\d+) \(release\), REVISION: (\d+)\.(\d+)", text)
    return ".".join(found.groups()) if found else ""


def gpu() -> Gpu | None:
    """The first GPU; None where there is none, or no driver."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return None
    device, version = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return None
    name, size = ctypes.create_string_buffer(256), ctypes.c_size_t()
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    cuda.cuDriverGetVersion(ctypes.byref(version))
    parts = [_attribute(cuda, number, device) for number in (_MAJOR, _MINOR)]
    newest = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return Gpu(name.value.decode(), f"sm_{parts[0]}{parts[1]}", size.value, newest)


def _attribute(cuda: Any, number: int, device: ctypes.c_int) -> int:
    found = ctypes.c_int()
    cuda.cuDeviceGetAttribute(ctypes.byref(found), number, device)
    return found.value


def _version(names: tuple[str, ...]) -> str:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def _providers() -> tuple[str, ...]:
    try:
        import onnxruntime
    except ImportError:
        return ()
    return tuple(onnxruntime.get_available_providers())


def _install(extra: str, jetson: str = "") -> str:
    if jetson and extra == "trt":
        return f"JetPack brings TensorRT; cuda-python on {CUDA_PYTHON}"
    return install(extra)
