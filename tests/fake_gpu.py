"""A GPU of numpy arrays whose engines run ONNX Runtime: all of the real backend, none of CUDA.

It holds the backend to what a GPU would: every read and write lies inside one allocation, work is
queued, a recorded graph replays what was queued (and reads pinned memory anew), shapes lie inside
the profile that the engines were built with.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from edgeprune.bundle import Bundle, sha256
from edgeprune.errors import BackendError
from edgeprune.runtime import engines, gpu
from edgeprune.runtime.build import BuildRequest, Engine, image_ranges, size_ranges
from edgeprune.runtime.gpu import Execution, Loaded, Shape

Profile = dict[str, list[Any]]
VERSION, COMPUTE, TEXT = "10.16.1", "sm_87", 200
FIRST = 1 << 20  # no address is small enough to be mistaken for a size


def pretend(bundle: Path, backend: str = "trt") -> Path:
    """A folder of engines that were never built; the record is one that `build` would write."""
    opened, request = Bundle.open(bundle), BuildRequest(bundle, backend, TEXT)
    capacities = [count + TEXT for count in opened.manifest.widest.counts]
    grows = opened.manifest.decoder.cache == "grow"
    profiles = {
        "decoder": size_ranges(opened, request, dict(enumerate(capacities)) if grows else {}),
        "vision": {},
        "vision_delta": {},
        "join": image_ranges(opened.manifest),
    }
    folder = bundle / "engines" / f"{backend}-pretended"
    folder.mkdir(parents=True)
    made = {}
    for name in engines.names(opened.manifest):
        file = folder / f"{name}.engine"
        file.write_bytes(f"{name}, as if compiled".encode())
        kept = Engine(file.name, 24, sha256(file), 1.0, dict(profiles[name]), (), ())
        made[name] = asdict(kept)
    record = {
        "bundle": bundle.name,
        "backend": backend,
        "version": VERSION,
        "dtype": opened.manifest.dtype,
        "compute": [],
        "gpu": COMPUTE,
        "text_capacity": TEXT,
        "capacities": capacities,
        "graphs": engines.graphs(opened),
        "engines": made,
    }
    (folder / "engine.json").write_text(json.dumps(record))
    return folder


def install(patch: pytest.MonkeyPatch, **options: Any) -> list[FakeGpu]:
    """Put a GPU of numpy arrays where a real one would be; the list holds those in use."""
    used: list[FakeGpu] = []

    def connect(backend: str) -> FakeGpu:
        used.append(FakeGpu(**{"compute": COMPUTE, **options}))
        return used[-1]

    for module in ("tensorrt", "tensorrt_rtx"):
        patch.setitem(sys.modules, module, SimpleNamespace(__version__=VERSION))
    patch.setattr(gpu, "connect", connect)
    return used


class FakeGpu:
    """One device; `memory` is what it can give."""

    def __init__(self, compute: str = "sm_89", memory: int = 1 << 40) -> None:
        self.compute, self.memory = compute, memory
        self.blocks: dict[int, NDArray[np.uint8]] = {}
        self.queue: list[Callable[[], None]] = []
        self.recording: list[Callable[[], None]] | None = None
        self.uploaded = self.downloaded = self.replays = 0

    @property
    def taken(self) -> int:
        """Bytes that were given."""
        return sum(block.size for block in self.blocks.values())

    def free_bytes(self) -> int:
        return self.memory - self.taken

    def allocate(self, size: int) -> int:
        address = FIRST + sum(block.size + 4096 for block in self.blocks.values())
        address += -address % 256
        self.blocks[address] = np.full(size, 0xAA, np.uint8)  # nothing is zero by luck
        return address

    def pinned(self, size: int) -> NDArray[np.uint8]:
        return np.zeros(size, np.uint8)

    def upload(self, address: int, host: NDArray[Any]) -> None:
        pinned = host if self.recording is not None else host.copy()

        def work() -> None:
            self.view(address, host.nbytes)[:] = pinned.reshape(-1).view(np.uint8)
            self.uploaded += host.nbytes

        self.put(work)

    def download(self, host: NDArray[Any], address: int) -> None:
        def work() -> None:
            host.reshape(-1).view(np.uint8)[:] = self.view(address, host.nbytes)
            self.downloaded += host.nbytes

        self.put(work)

    def copy(self, to: int, source: int, size: int) -> None:
        def work() -> None:
            self.view(to, size)[:] = self.view(source, size)

        self.put(work)

    def wait(self) -> None:
        assert self.recording is None, "a stream that is being recorded cannot be waited for"
        work, self.queue = self.queue, []
        for step in work:
            step()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recording = []
        work()
        recorded, self.recording = self.recording, None

        def replay() -> None:
            self.replays += 1
            self.queue += recorded

        return replay

    def load(self, file: Path) -> Loaded:
        return FakeEngine(self, file)

    def close(self) -> None:
        self.blocks.clear()

    def put(self, work: Callable[[], None]) -> None:
        (self.queue if self.recording is None else self.recording).append(work)

    def view(self, address: int, size: int) -> NDArray[np.uint8]:
        """So many bytes at an address, all of one allocation."""
        for start, block in self.blocks.items():
            if start <= address and address + size <= start + block.size:
                return block[address - start : address - start + size]
        raise AssertionError(f"{size} bytes at {address} lie in no allocation")


class FakeEngine:
    """The bundle's graph of the same name, with the profiles that engine.json has."""

    scratch = 512

    def __init__(self, gpu: FakeGpu, file: Path) -> None:
        self.gpu = gpu
        options = ort.SessionOptions()
        options.log_severity_level = 4  # caches are copied: numpy has nothing in place
        graph = file.parents[2] / f"{file.stem}.onnx"  # the bundle that holds engines/KEY/
        self.session = ort.InferenceSession(graph, options, ["CPUExecutionProvider"])
        record = json.loads((file.parent / "engine.json").read_text())
        profiles = record["engines"][file.stem]["profiles"]
        self.profiles: list[Profile] = list(profiles.values()) or [{}]
        self.capacities = record["capacities"]

    def executions(self, scratch: int) -> list[Execution]:
        self.gpu.view(scratch, self.scratch)
        return [FakeExecution(self, profile) for profile in self.profiles]


class FakeExecution:
    """Shapes and addresses as they are when a run is queued."""

    def __init__(self, engine: FakeEngine, profile: Profile) -> None:
        self.engine, self.profile, self.gpu = engine, profile, engine.gpu
        self.shapes: dict[str, Shape] = {}
        self.addresses: dict[str, int] = {}
        self.held: dict[str, NDArray[np.int64]] = {}  # values on the host
        for end in engine.session.get_inputs():
            sizes = [self._fixed(size) for size in end.shape]
            if None not in sizes:
                self.shapes[end.name] = tuple(size for size in sizes if size is not None)

    def _fixed(self, size: int | str) -> int | None:
        if isinstance(size, int):
            return size
        name, _, layer = size.partition(".")
        return self.engine.capacities[int(layer)] if name == "capacity" else None

    def shape(self, name: str, shape: Shape) -> None:
        (end,) = (e for e in self.engine.session.get_inputs() if e.name == name)
        for size, known in zip(shape, end.shape, strict=True):
            if isinstance(known, int):
                assert size == known, name
            elif known in self.profile and not known.startswith("capacity"):
                least, _, most = self.profile[known]
                if not least <= size <= most:
                    raise BackendError(f"{name} {list(shape)} is outside {known} {least}..{most}")
        self.shapes[name] = shape

    def address(self, name: str, address: int) -> None:
        assert address % 256 == 0, f"{name} is not aligned"
        self.addresses[name] = address

    def values(self, name: str, values: NDArray[np.int64]) -> None:
        least, _, most = self.profile[name]
        assert (np.array(least) <= values).all() and (values <= np.array(most)).all(), name
        self.held[name] = values.copy()

    def recordable(self) -> bool:
        return True

    def run(self) -> None:
        shapes, addresses, held = dict(self.shapes), dict(self.addresses), dict(self.held)
        self.gpu.put(lambda: self._run(shapes, addresses, held))

    def _run(
        self, shapes: dict[str, Shape], addresses: dict[str, int], held: dict[str, Any]
    ) -> None:
        feeds = dict(held)
        for end in self.engine.session.get_inputs():
            if end.name in held:
                continue
            kind = {"tensor(int64)": np.int64, "tensor(float16)": np.float16}.get(
                end.type, np.float32
            )
            size = int(np.prod(shapes[end.name])) * np.dtype(kind).itemsize
            stored = self.gpu.view(addresses[end.name], size).view(kind)
            feeds[end.name] = stored.reshape(shapes[end.name]).copy()
        names = [end.name for end in self.engine.session.get_outputs()]
        for name, found in zip(names, self.engine.session.run(names, feeds), strict=True):
            data = np.ascontiguousarray(found).reshape(-1).view(np.uint8)
            self.gpu.view(addresses[name], data.size)[:] = data
