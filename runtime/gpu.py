"""The seam to a GPU: memory by address, one stream of work in order, engines.

`Gpu` is all that the TensorRT backend asks for. `connect` gives the real one, over cuda-python and
TensorRT or TensorRT-RTX; tests put another in its place.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeprune import memory
from edgeprune.errors import BackendError
from edgeprune.install_hints import CUDA_PYTHON, install
from edgeprune.runtime import machine
from edgeprune.runtime import trt as seam

Bytes = NDArray[np.uint8]
Shape = tuple[int, ...]


class Execution(Protocol):
    """One profile of an engine, ready to run."""

    def shape(self, name: str, shape: Shape) -> None:
        """The shape of an input from now on."""

    def address(self, name: str, address: int) -> None:
        """Where an input or output lies from now on."""

    def values(self, name: str, values: NDArray[np.int64]) -> None:
        """What an input that decides shapes holds from now on; it lies on the host."""

    def run(self) -> None:
        """Queue one run."""

    def recordable(self) -> bool:
        """Whether a run may be recorded with `Gpu.record`."""


class Loaded(Protocol):
    """A deserialised engine."""

    scratch: int  # bytes that its runs need besides inputs, outputs and weights

    def executions(self, scratch: int) -> list[Execution]:
        """One for each profile; they share the memory at `scratch`, so one runs at a time."""


class Gpu(Protocol):
    """A device. Uploads, downloads and runs are queued and happen in order; `wait` ends them."""

    compute: str  # such as sm_87

    def free_bytes(self) -> int: ...

    def allocate(self, size: int) -> int:
        """An address of so many bytes, until `close`."""

    def pinned(self, size: int) -> Bytes:
        """Host memory that recorded copies read and write anew each time, until `close`."""

    def upload(self, address: int, host: NDArray[Any]) -> None: ...

    def download(self, host: NDArray[Any], address: int) -> None: ...

    def copy(self, to: int, source: int, size: int) -> None:
        """So many bytes from one address to another."""

    def wait(self) -> None: ...

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What `work` would queue, as one thing to queue again and again; now nothing runs."""

    def load(self, file: Path) -> Loaded:
        """Deserialise an engine: code, so only one that is known."""

    def close(self) -> None:
        """Free all memory that it gave, once the engines that work on it are gone."""


def connect(backend: str) -> Gpu:
    """The GPU of this machine; BackendError where there is none, or no TensorRT."""
    trt = seam.load(backend)
    return CudaGpu(trt, seam.TITLES[backend], _cudart(backend))


def _cudart(backend: str) -> Any:
    """cuda-python's runtime API: cuda.bindings.runtime, or cuda.cudart in releases up to 12.6."""
    for name in ("cuda.bindings.runtime", "cuda.cudart"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    how = CUDA_PYTHON if machine.jetson() else install(backend)
    raise BackendError(f"cuda-python is not installed; {how}")


class CudaGpu:
    """The first NVIDIA GPU."""

    def __init__(self, trt: Any, title: str, cudart: Any) -> None:
        self.trt, self.title, self.cudart = trt, title, cudart
        self.logger = seam.quiet_logger(trt)
        self.held: list[tuple[str, Any]] = []  # how to free what, the newest last
        try:
            (count,) = self._call("cudaGetDeviceCount")
        except BackendError as error:
            raise BackendError(f"no NVIDIA GPU can be used here ({error}); use ort-cpu") from error
        if not count:
            raise BackendError("no NVIDIA GPU is found here; use the backend ort-cpu")
        self._call("cudaSetDevice", 0)
        kind = cudart.cudaDeviceAttr
        major = self._attribute(kind.cudaDevAttrComputeCapabilityMajor)
        minor = self._attribute(kind.cudaDevAttrComputeCapabilityMinor)
        self.compute = f"sm_{major}{minor}"
        self.shared = bool(self._attribute(kind.cudaDevAttrIntegrated))  # with the CPU: a Jetson
        (self.stream,) = self._call("cudaStreamCreate")
        self.held.append(("cudaStreamDestroy", self.stream))

    def free_bytes(self) -> int:
        """What the driver can give; on a Jetson, whose CPU shares it, page caches count as free."""
        free, _ = self._call("cudaMemGetInfo")
        return max(int(free), memory.available_bytes() or 0) if self.shared else int(free)

    def allocate(self, size: int) -> int:
        (address,) = self._call("cudaMalloc", size)
        self.held.append(("cudaFree", address))
        return int(address)

    def pinned(self, size: int) -> Bytes:
        (address,) = self._call("cudaMallocHost", size)
        self.held.append(("cudaFreeHost", address))
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(address)))

    def upload(self, address: int, host: NDArray[Any]) -> None:
        to = self.cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, host.ctypes.data, host.nbytes, to, self.stream)

    def download(self, host: NDArray[Any], address: int) -> None:
        to = self.cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", host.ctypes.data, address, host.nbytes, to, self.stream)

    def copy(self, to: int, source: int, size: int) -> None:
        within = self.cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpyAsync", to, source, size, within, self.stream)

    def wait(self) -> None:
        self._call("cudaStreamSynchronize", self.stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        mode = self.cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self.stream, mode)
        try:
            work()
        finally:
            (graph,) = self._call("cudaStreamEndCapture", self.stream)
        (ready,) = self._call("cudaGraphInstantiate", graph, 0)
        self.held += [("cudaGraphDestroy", graph), ("cudaGraphExecDestroy", ready)]
        return lambda: self._launch(ready)

    def load(self, file: Path) -> Loaded:
        runtime = self.trt.Runtime(self.logger)
        with file.open("rb") as stream:  # mapped: no copy on a device whose GPU shares its memory
            plan = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            why = self.logger.errors[-1] if self.logger.errors else "no reason given"
            raise BackendError(f"{self.title} {self.trt.__version__} cannot load {file}: {why}")
        return _Engine(self, runtime, engine)

    def close(self) -> None:
        while self.held:
            name, what = self.held.pop()
            getattr(self.cudart, name)(what)  # fails, without harm, where the device has failed

    def _launch(self, ready: Any) -> None:
        self._call("cudaGraphLaunch", ready, self.stream)

    def _attribute(self, kind: Any) -> int:
        return int(self._call("cudaDeviceGetAttribute", kind, 0)[0])

    def _call(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        """Call the CUDA runtime; BackendError where it returns an error."""
        code, *values = getattr(self.cudart, name)(*arguments)
        if int(code):
            _, words = self.cudart.cudaGetErrorString(code)
            text = words.decode() if isinstance(words, bytes) else str(words)
            raise BackendError(f"CUDA: {name}: {text}")
        return tuple(values)


class _Engine:
    def __init__(self, gpu: CudaGpu, runtime: Any, engine: Any) -> None:
        self.gpu, self.runtime, self.engine = gpu, runtime, engine
        profiles = range(engine.num_optimization_profiles)
        self.scratch = max(int(engine.get_device_memory_size_for_profile_v2(p)) for p in profiles)

    def executions(self, scratch: int) -> list[Execution]:
        return [_Execution(self, p, scratch) for p in range(self.engine.num_optimization_profiles)]


class _Execution:
    def __init__(self, loaded: _Engine, profile: int, scratch: int) -> None:
        self.gpu, self.held = loaded.gpu, dict[str, NDArray[np.int64]]()
        strategy = self.gpu.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self.context = loaded.engine.create_execution_context(strategy)
        if self.context is None:
            raise BackendError(f"{self.gpu.title} cannot make an execution context{self._why()}")
        self.context.set_device_memory(scratch, loaded.scratch)
        if not self.context.set_optimization_profile_async(profile, int(self.gpu.stream)):
            raise BackendError(f"{self.gpu.title} refuses profile {profile}{self._why()}")
        self.gpu.wait()

    def shape(self, name: str, shape: Shape) -> None:
        if not self.context.set_input_shape(name, shape):
            raise BackendError(f"{self.gpu.title} refuses {name} {list(shape)}{self._why()}")

    def address(self, name: str, address: int) -> None:
        if not self.context.set_tensor_address(name, address):
            raise BackendError(f"{self.gpu.title} refuses the address of {name}{self._why()}")

    def values(self, name: str, values: NDArray[np.int64]) -> None:
        held = self.held.setdefault(name, np.zeros(values.size, np.int64))
        held[:] = values
        self.address(name, held.ctypes.data)

    def run(self) -> None:
        if not self.context.execute_async_v3(int(self.gpu.stream)):
            raise BackendError(f"{self.gpu.title} failed{self._why()}")

    def recordable(self) -> bool:
        ask = getattr(self.context, "is_stream_capturable", None)  # TensorRT-RTX has it
        return True if ask is None else bool(ask(int(self.gpu.stream)))

    def _why(self) -> str:
        errors = self.gpu.logger.errors
        return f": {errors[-1]}" if errors else ""
