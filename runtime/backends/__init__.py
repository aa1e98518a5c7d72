"""The inference libraries, one file each: the file's name is the backend's, `ort_cuda` is ort-cuda.

A file has `KIND`, what its users must know before a bundle is opened, and `make`, which opens one.
Adding a backend is adding a file. Libraries are imported when a bundle is opened.
"""

from __future__ import annotations

import os
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from edgeprune.bundle import Bundle
from edgeprune.errors import BackendError, SpecError
from edgeprune.runtime.backend import Backend, Kind

THREADS = 4
"""For each CPU at most: more wait for each other, and thousands take minutes to start."""
NAMES = tuple(
    sorted(
        module.name.replace("_", "-") for module in iter_modules(__path__) if module.name[0] != "_"
    )
)


def find(name: str) -> Kind:
    """What kind of backend a name is; BackendError, before anything slow, where there is none."""
    kind: Kind = _load(name).KIND
    return kind


def make(bundle: Bundle, name: str, threads: int | None = None) -> Backend[Any]:
    """A bundle's graphs, or engines, on a backend; `threads` are the CPU's."""
    module, most = _load(name), THREADS * (os.cpu_count() or 1)
    if threads is not None:
        if threads > most:
            raise SpecError(f"--threads is at most {most}, {THREADS} for each CPU; got {threads}")
        if module.KIND.engines:
            raise SpecError(f"--threads is for ort-cpu; {name} runs on a GPU")
    opened: Backend[Any] = module.make(bundle, threads)
    return opened


def _load(name: str) -> Any:
    if name not in NAMES:
        raise BackendError(f"there is no backend {name!r}; choose: {', '.join(NAMES)}")
    return import_module(f"{__name__}.{name.replace('-', '_')}")
