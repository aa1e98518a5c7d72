"""ONNX Runtime on an NVIDIA GPU."""

from __future__ import annotations

from edgeprune.bundle import Bundle
from edgeprune.runtime.backend import Kind
from edgeprune.runtime.backends._ort import RUNS, OrtBackend

KIND = Kind(dtypes=RUNS, gpu=True, engines=False)


def make(bundle: Bundle, threads: int | None) -> OrtBackend:
    return OrtBackend(bundle, "cuda", threads)
