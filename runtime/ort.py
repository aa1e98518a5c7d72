"""ONNX Runtime: caches live in bound buffers, past and present in the same one where they can."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.bundle import Bundle
from edgeprune.errors import BackendError, SpecError
from edgeprune.hints import install
from edgeprune.runtime import _caches
from edgeprune.runtime.backend import Chunk, Ids, Output

ELEMENTS = {"fp32": np.float32, "fp16": np.float16}
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OrtBackend:
    """The bundle's two graphs on one execution provider: `cpu` or `cuda`."""

    text_capacity: int | None = None
    build_seconds: float | None = None

    def __init__(self, bundle: Bundle, device: str = "cpu", threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise SpecError(f"--threads is at least 1; got {threads}")
        ort = _import()
        manifest = bundle.manifest
        if manifest.dtype not in ELEMENTS:
            raise BackendError(
                f"ONNX Runtime runs fp32 and fp16 bundles, {bundle.path} is {manifest.dtype};"
                " export it again with --dtype fp16"
            )
        self.name = f"ort-{device}"
        self.record, self.counts = manifest.decoder, manifest.prune.counts
        self.element, self.device = ELEMENTS[manifest.dtype], device
        self._kept = list(manifest.prune.kept_outputs)
        options = ort.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        providers = _providers(ort, device)
        self._vision = _session(ort, bundle, "vision.onnx", options, providers)
        self._decoder = _session(ort, bundle, "decoder.onnx", options, providers)
        self._value = ort.OrtValue
        self._caches = _caches.make(ort, manifest.decoder, self.element, device)
        self._no_ids = self._host(np.zeros((1, 0), np.int64))
        self._no_visual = self._host(np.zeros((1, 0, self.record.width), self.element))
        self._visual, self._places = self._no_visual, self._host(np.zeros(0, np.int64))
        self._no_places = self._places
        self._logits = self._host(np.zeros((1, 1, self.record.vocabulary), self.element))
        self._step: _Step | None = None

    def see(self, pixels: NDArray[np.float32]) -> Ids:
        binding = self._vision.io_binding()
        binding.bind_ortvalue_input("pixels", self._host(pixels.astype(self.element)))
        binding.bind_output("visual", self.device)
        binding.bind_output("kept", "cpu")
        _run(self._vision, binding, "vision.onnx")
        self._visual, self._places = binding.get_outputs()
        found: Ids = self._places.numpy()
        return found

    def reserve(self, capacities: Sequence[int]) -> None:
        if self._caches.reserve(capacities):
            self._step = None  # it is bound to other buffers

    def run(self, chunk: Chunk) -> Output:
        single = not chunk.with_picture and chunk.text_ids.shape[1] == 1
        if single and not chunk.prefix_ids.size:
            if self._step is None:
                self._step = _Step(self)
            self._step.run(chunk)
            return Output(self.logits(), ())
        binding = self._bind(
            self._host(chunk.prefix_ids),
            self._host(chunk.text_ids),
            self._host(np.array([chunk.position])),
            self._host(chunk.lengths),
            with_picture=chunk.with_picture,
        )
        self._caches.bind(binding, chunk.lengths, self._after(chunk))
        for name in self._kept:
            binding.bind_output(name, "cpu")
        _run(self._decoder, binding, "decoder.onnx")
        kept = binding.get_outputs()[-len(self._kept) :] if self._kept else []
        return Output(self.logits(), tuple(k.numpy() for k in kept))

    def cache_bytes(self) -> int:
        return self._caches.bytes()

    def close(self) -> None:
        del self._vision, self._decoder, self._step, self._caches, self._visual

    def _after(self, chunk: Chunk) -> Ids:
        """Tokens in each layer's cache once a chunk has been read."""
        text = chunk.prefix_ids.size + chunk.text_ids.size
        visual = np.array(self.counts) if chunk.with_picture else 0
        after: Ids = chunk.lengths + text + visual
        return after

    def logits(self) -> NDArray[Any]:
        """Those of the last call, [vocabulary]."""
        found: NDArray[Any] = self._logits.numpy()[0, 0]
        return found

    def _bind(
        self, prefix: Any, text: Any, position: Any, lengths: Any, *, with_picture: bool
    ) -> Any:
        binding = self._decoder.io_binding()
        binding.bind_ortvalue_input("prefix_ids", prefix)
        binding.bind_ortvalue_input("text_ids", text)
        binding.bind_ortvalue_input("position", position)
        binding.bind_ortvalue_input("lengths", lengths)
        binding.bind_ortvalue_input("visual", self._visual if with_picture else self._no_visual)
        if self.record.span is not None:
            places = self._places if with_picture else self._no_places
            binding.bind_ortvalue_input("places", places)
        binding.bind_ortvalue_output("logits", self._logits)
        return binding

    def _host(self, array: NDArray[Any]) -> Any:
        return self._value.ortvalue_from_numpy(np.ascontiguousarray(array))


class _Step:
    """A decode step bound once: three small inputs are rewritten in place, the rest stays."""

    def __init__(self, backend: OrtBackend) -> None:
        host = backend._host
        self.decoder, self.caches = backend._decoder, backend._caches
        self.text = host(np.zeros((1, 1), np.int64))
        self.position = host(np.zeros(1, np.int64))
        self.lengths = host(np.zeros(backend.record.layers, np.int64))
        self.binding = backend._bind(
            backend._no_ids, self.text, self.position, self.lengths, with_picture=False
        )
        self.bound = False

    def run(self, chunk: Chunk) -> None:
        self.text.update_inplace(chunk.text_ids)
        self.position.update_inplace(np.array([chunk.position]))
        self.lengths.update_inplace(chunk.lengths)
        if self.caches.moving or not self.bound:
            self.caches.bind(self.binding, chunk.lengths, chunk.lengths + 1)
            self.bound = True
        _run(self.decoder, self.binding, "decoder.onnx")


def _import() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(f"ONNX Runtime is not installed; {install('cpu')} (or [gpu])") from error
    return onnxruntime


def _providers(ort: Any, device: str) -> list[str]:
    wanted = PROVIDERS[device]
    if wanted not in ort.get_available_providers():
        raise BackendError(
            f"this ONNX Runtime has no {wanted}, only {', '.join(ort.get_available_providers())};"
            f" pip uninstall onnxruntime, then {install('gpu')}"
        )
    return [wanted] if device == "cpu" else [wanted, PROVIDERS["cpu"]]


def _run(session: Any, binding: Any, name: str) -> None:
    try:
        session.run_with_iobinding(binding)
    except Exception as error:  # onnxruntime raises a kind per status code
        raise BackendError(
            f"ONNX Runtime failed in {name} ({error}); where memory is short, shorten the prompt"
            " or export with a larger --cr"
        ) from error


def _session(ort: Any, bundle: Bundle, name: str, options: Any, providers: list[str]) -> Any:
    try:
        session = ort.InferenceSession(os.fspath(bundle.file(name)), options, providers)
    except Exception as error:  # onnxruntime raises a kind per status code
        raise BackendError(
            f"ONNX Runtime {ort.__version__} refuses {bundle.file(name)}: {error}"
        ) from error
    if session.get_providers()[0] != providers[0]:
        raise BackendError(
            f"{providers[0]} could not start (ONNX Runtime fell back to"
            f" {session.get_providers()[0]}); check the GPU's driver and CUDA libraries"
        )
    return session
