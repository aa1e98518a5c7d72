"""The seam to TensorRT and TensorRT-RTX: one Python API under two module names."""

from __future__ import annotations

import importlib
import importlib.util
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from edgeprune.errors import BackendError, brief
from edgeprune.graphs import GraphRecord
from edgeprune.install_hints import install
from edgeprune.progress import Progress
from edgeprune.runtime import machine

MODULES = {"trt": "tensorrt", "trt-rtx": "tensorrt_rtx"}
TITLES = {"trt": "TensorRT", "trt-rtx": "TensorRT-RTX"}

_INSTALL = {
    "trt": f"JetPack brings it; elsewhere {install('trt')}",
    "trt-rtx": install("trt-rtx"),
}
_NO_DRIVER = "CUDA driver version is insufficient"  # said in passing where there is no GPU


def installed() -> str:
    """The backend whose module is there, TensorRT before TensorRT-RTX; BackendError if none."""
    for backend, module in MODULES.items():
        if importlib.util.find_spec(module) is not None:
            return backend
    ways = "; ".join(f"{TITLES[b]}: {way}" for b, way in _INSTALL.items())
    raise BackendError(f"neither TensorRT nor TensorRT-RTX is installed. {ways}")


def load(backend: str) -> Any:
    """Import a backend's module."""
    if backend not in MODULES:
        raise BackendError(f"engines are built by {' or '.join(MODULES)}; got {backend!r}")
    try:
        return importlib.import_module(MODULES[backend])
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == MODULES[backend]
        found = "is not installed" if missing else f"cannot be loaded ({error})"
        raise BackendError(f"{TITLES[backend]} {found}; {_INSTALL[backend]}") from error


def gpu() -> str | None:
    """Compute capability of the first GPU, such as `sm_87`; None where there is no driver."""
    found = machine.gpu()
    return found.compute if found else None


def quiet_logger(trt: Any) -> Any:
    """A logger that prints nothing and keeps the errors in `errors`."""

    class Quiet(trt.ILogger):  # type: ignore[misc]  # the base is known at run time only
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR and _NO_DRIVER not in message:
                self.errors.append(message)

    return Quiet()


def monitor(trt: Any, step: str, report: Progress) -> Any:
    """Reports the outermost phases of a build as they go."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}
            self.stop: Sequence[int] = ()  # anything in it cancels the build

        def phase_start(self, phase: str, parent: str | None, total: int) -> None:
            if not parent:
                self.totals[phase] = total
                report(step, 0, total)

        def step_complete(self, phase: str, done: int) -> bool:
            if phase in self.totals:
                report(step, done + 1, self.totals[phase])
            return not self.stop

        def phase_finish(self, phase: str) -> None:
            self.totals.pop(phase, None)

    return Monitor()


def compiled(builder: Any, network: Any, config: Any, watch: Any) -> Any:
    """The serialized engine, or None where the builder fails; Ctrl-C ends it at its next step."""
    with _interrupts_noted() as noted:
        watch.stop = noted
        plan = builder.build_serialized_network(network, config)
    if noted:
        raise KeyboardInterrupt
    return plan


@contextmanager
def _interrupts_noted() -> Iterator[list[int]]:
    """Collect signals: an exception inside a callback of the builder would be lost in C++."""
    noted: list[int] = []
    kept: dict[int, Any] = {}
    with suppress(ValueError):  # not the main thread, which alone gets signals
        for number in (signal.SIGINT, signal.SIGTERM):
            kept[number] = signal.signal(number, lambda number, frame: noted.append(number))
    try:
        yield noted
    finally:
        for watched, handler in kept.items():
            signal.signal(watched, handler)


def strongly_typed(trt: Any) -> int:
    """Flags of a network whose types are the graph's; TensorRT 11 knows no other."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def refusals(parser: Any) -> str:
    """What a parser did not take, in one line: the node, its operator and the reason."""
    found = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        reason = error.desc().strip().splitlines() or ["no reason given"]
        text = " ".join(line for line in reason if _NO_DRIVER not in line)
        operator = error.node_operator()
        where = f"node {error.node_name()} ({operator}): " if operator else ""
        found.append(f"{where}{text}")
    return brief("; ".join(found) or "no reason given")


def let_fall_back(trt: Any, network: Any) -> None:
    """Let attention be computed in several steps where no fused kernel fits it.

    Otherwise builds fail, of small encoders and of encoders whose queries a policy reads too.
    """
    for layer in map(network.get_layer, range(network.num_layers)):
        if layer.type == getattr(trt.LayerType, "ATTENTION_INPUT", None):
            layer.__class__ = trt.IAttentionInputLayer  # the binding returns the base class
            layer.attention.decomposable = True


def narrow_indices(trt: Any, network: Any, graph: GraphRecord) -> None:
    """Give the cache updates int32 indices, all cut from one int32 vector of lengths.

    ONNX wants int64 there. With that, TensorRT-RTX 1.7 converts one index per layer and fails in
    its compiler where a narrow decoder has three or more layers ("there are uses before defs").
    """
    lengths, indices = None, {}
    layers = {cache.past.name: cache.index for cache in graph.caches}
    for layer in map(network.get_layer, range(network.num_layers)):
        if layer.type != getattr(trt.LayerType, "KV_CACHE_UPDATE", None):
            continue
        if lengths is None:
            inputs = map(network.get_input, range(network.num_inputs))
            names = [tensor.name for tensor in graph.inputs if tensor.role == "lengths"]
            (wide,) = (tensor for tensor in inputs if tensor.name in names)
            lengths = network.add_cast(wide, trt.int32).get_output(0)
        number = layers[layer.get_input(0).name]
        if number not in indices:
            cut = network.add_slice(lengths, (number,), (1,), (1,))
            indices[number] = cut.get_output(0)
        layer.set_input(2, indices[number])
