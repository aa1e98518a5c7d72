"""The inference libraries by name; each is imported when it is asked for."""

from __future__ import annotations

import os
from typing import Any

from edgeprune.bundle import Bundle
from edgeprune.errors import BackendError, SpecError
from edgeprune.runtime.backend import Backend

THREADS = 4
"""For each CPU at most: more wait for each other, and thousands take minutes to start."""
NAMES = ("ort-cpu", "ort-cuda", "trt", "trt-rtx")


def check(name: str) -> None:
    """BackendError, before anything slow, unless there is such a backend."""
    if name not in NAMES:
        raise BackendError(f"there is no backend {name!r}; choose: {', '.join(NAMES)}")


def make(bundle: Bundle, name: str, threads: int | None = None) -> Backend[Any]:
    """A bundle's graphs, or engines, on a backend; `threads` are the CPU's."""
    check(name)
    most = THREADS * (os.cpu_count() or 1)
    if threads is not None and threads > most:
        raise SpecError(f"--threads is at most {most}, {THREADS} for each CPU; got {threads}")
    if name.startswith("ort-"):
        from edgeprune.runtime.ort import OrtBackend

        return OrtBackend(bundle, name.partition("-")[2], threads)
    from edgeprune.runtime.trt_backend import TrtBackend

    if threads is not None:
        raise SpecError(f"--threads is for ort-cpu; {name} runs on a GPU")
    return TrtBackend(bundle, name)
