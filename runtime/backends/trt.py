"""TensorRT, from engines that `edgeprune build` compiled."""

from __future__ import annotations

from edgeprune.bundle import Bundle
from edgeprune.runtime.backend import Kind
from edgeprune.runtime.backends._trt import RUNS, TrtBackend

KIND = Kind(dtypes=RUNS, gpu=True, engines=True)


def make(bundle: Bundle, threads: int | None) -> TrtBackend:
    return TrtBackend(bundle, "trt")
