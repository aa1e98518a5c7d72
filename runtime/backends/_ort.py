"""ONNX Runtime: caches live in bound buffers, past and present in the same one where they can."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import cached_property, partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.bundle import Bundle
from edgeprune.errors import BackendError, SpecError, brief
from edgeprune.graphs import DELTA, GRAPHS, JOIN, VISION, TensorRecord
from edgeprune.install_hints import install
from edgeprune.manifest import Manifest
from edgeprune.runtime import dtypes
from edgeprune.runtime.backend import (
    ChangedPatches,
    DecoderInputs,
    EncodedImage,
    EncodedTile,
    Ids,
    Output,
    likeliest,
)
from edgeprune.runtime.backends import _caches
from edgeprune.runtime.backends._caches import OrtCaches
from edgeprune.runtime.backends._timed import TimedPart

RUNS = ("fp32", "fp16")
"""Dtypes of the bundles that ONNX Runtime has kernels for."""
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OrtBackend:
    """The bundle's graphs on one execution provider: `cpu` or `cuda`."""

    text_capacity: int | None = None
    build_seconds: float | None = None

    def __init__(
        self,
        bundle: Bundle,
        device: str = "cpu",
        threads: int | None = None,
        profile: Path | None = None,
    ) -> None:
        """`profile`: where ONNX Runtime writes what each node took, to files of this prefix."""
        if threads is not None and threads < 1:
            raise SpecError(f"--threads is at least 1; got {threads}")
        ort = _import()
        bundle.require_weights("ONNX Runtime")
        manifest = bundle.manifest
        if manifest.dtype not in RUNS:
            raise BackendError(
                f"ONNX Runtime runs fp32 and fp16 bundles, {bundle.path} is {manifest.dtype};"
                " export it again with --dtype fp16"
            )
        self.name = f"ort-{device}"
        self.record, self.device = manifest.decoder, device
        self.element = dtypes.stored_type(manifest.dtype).type
        self._graph, self._tile, self._image = manifest.graph, manifest.vision, manifest.join
        self._graphs, self._default = manifest.graphs, np.array(manifest.prune.counts)
        options = _options(ort, bundle.manifest, threads, profile)
        # Idle threads spin for some milliseconds. Those of one session would take the cores from
        # the next: vision's from prefill, and each bundle's of a benchmark from the other's.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        providers = _providers(ort, device)
        self._open = partial(_session, ort, bundle, options=options, providers=providers)
        self._vision, self._join, self._decoder = map(self._open, GRAPHS)
        self._value = ort.OrtValue
        with _refusals("memory for the caches"):
            self._memory = _caches.Device.open(ort, device, self.element, providers)
            self._logits = self._memory.block((1, 1, self.record.vocabulary))
        token = self._graph.output("token")
        self._token = None if token is None else self._host(np.zeros((1, 1), np.int64))
        self._no_ids = self._host(np.zeros((1, 0), np.int64))
        no_visual = self._host(np.zeros((1, 0, self.record.visual_width), self.element))
        no_indices = np.zeros(0, np.int64)
        self._no_image = EncodedImage(no_visual, self._host(no_indices), no_indices)

    def encode_tile(self, pixels: NDArray[np.float32], *, caches: bool = False) -> EncodedTile:
        wanted = [tensor for tensor in self._tile.outputs if caches or tensor.layer is None]
        with _refusals(VISION):
            binding, shown = self._vision.io_binding(), self._host(pixels.astype(self.element))
            binding.bind_ortvalue_input("pixels", shown)
            return self._encoded(self._vision, binding, wanted)

    def encode_changed(self, tile: EncodedTile, changed: ChangedPatches) -> EncodedTile:
        given = {
            "patches": changed.pixels.astype(self.element),
            "patch_indices": changed.indices,
        }
        assert tile.caches is not None  # it was encoded with them
        with _refusals(DELTA):
            binding, record = self._changed.io_binding(), self._graphs[DELTA]
            held = {role: self._host(array) for role, array in given.items()}
            for tensor in record.inputs:
                if tensor.role in held:
                    value = held[tensor.role]
                elif tensor.layer is not None:
                    value = tile.caches[tensor.cached]
                else:
                    value = tile.signals[tensor.role.removeprefix("previous_")]
                binding.bind_ortvalue_input(tensor.name, value)
            return self._encoded(self._changed, binding, record.outputs, tile.caches)

    @cached_property
    def _changed(self) -> Any:
        """Few bundles have it, and few callers use it: opened when it is first needed."""
        return self._open(DELTA)

    def _encoded(
        self,
        session: Any,
        binding: Any,
        outputs: Sequence[TensorRecord],
        caches: Mapping[tuple[str, int], Any] | None = None,
    ) -> EncodedTile:
        """What a bound call gives of a tile. `caches` are written in place: a block scatters its
        new keys and values into those that it was given."""
        for tensor in outputs:
            if caches is None or tensor.layer is None:
                binding.bind_output(tensor.name, self.device)
            else:
                binding.bind_ortvalue_output(tensor.name, caches[tensor.cached])
        session.run_with_iobinding(binding)
        found = list(zip(outputs, binding.get_outputs(), strict=True))
        signals = {tensor.role: value for tensor, value in found if tensor.layer is None}
        kept = {tensor.cached: value for tensor, value in found if tensor.layer is not None}
        return EncodedTile(signals, kept or None)

    def join(self, tiles: Sequence[EncodedTile], counts: Ids | None = None) -> EncodedImage:
        with _refusals(JOIN):
            binding = self._join.io_binding()
            given = self._host(self._default if counts is None else counts)
            for tensor in self._image.inputs:
                value = (
                    given if tensor.tile is None else tiles[tensor.tile - 1].signals[tensor.role]
                )
                binding.bind_ortvalue_input(tensor.name, value)
            binding.bind_output("visual", self.device)
            binding.bind_output("visual_indices", "cpu")
            self._join.run_with_iobinding(binding)
            visual, indices = binding.get_outputs()
        return EncodedImage(visual, indices, indices.numpy().copy())

    def as_image(self, visual: NDArray[np.float32], indices: Ids) -> EncodedImage:
        """Visual tokens from elsewhere, any number of them: [1, n, width], [n]."""
        on_host = self._host(visual.astype(self.element)), self._host(indices)
        return EncodedImage(*on_host, indices)

    def part(self, name: str) -> TimedPart:
        """A graph of the bundle that is only timed."""
        return TimedPart(self._open(name), self._host, self.device, partial(_refusals, name))

    def caches(self) -> OrtCaches:
        return _caches.make(self._memory, self.record, self._graph.caches)

    def copy(self, caches: OrtCaches, lengths: Ids) -> OrtCaches:
        with _refusals("a copy of the caches"):
            return caches.copy(lengths)

    def run(self, inputs: DecoderInputs, caches: OrtCaches) -> Output:
        with _refusals("decoder.onnx"):
            caches.reserve(inputs.lengths, inputs.filled)
            kept = self._step(inputs, caches) if inputs.is_step else self._read(inputs, caches)
            return self._output(inputs, kept)

    def close(self) -> None:
        del self._vision, self._join, self._decoder, self._memory, self._logits
        vars(self).pop("_changed", None)

    def _step(self, inputs: DecoderInputs, caches: OrtCaches) -> tuple[Ids, ...]:
        if caches.step is None:
            caches.step = _Step(self)
        caches.step.run(inputs, caches)
        return ()

    def _read(self, inputs: DecoderInputs, caches: OrtCaches) -> tuple[Ids, ...]:
        """A prefill or a later turn: the kept positions of each site."""
        binding, sites = self._bind(inputs.image), self._graph.kept
        sources = {
            "prefix_ids": inputs.prefix_ids,
            "text_ids": inputs.text_ids,
            "position": np.array([inputs.position]),
            "lengths": inputs.lengths,
            "counts": self._default if inputs.counts is None else inputs.counts,
        }
        # A binding holds no array before ONNX Runtime 1.31: these live until the call is over.
        held = {role: self._host(array) for role, array in sources.items()}
        for tensor in self._graph.inputs:
            if tensor.role in held:
                binding.bind_ortvalue_input(tensor.name, held[tensor.role])
        caches.bind(binding, inputs.lengths, inputs.filled)
        for tensor in sites:
            binding.bind_output(tensor.name, "cpu")
        self._decoder.run_with_iobinding(binding)
        kept = binding.get_outputs()[-len(sites) :] if sites else []
        return tuple(value.numpy().copy() for value in kept)

    def _output(self, inputs: DecoderInputs, kept: tuple[Ids, ...]) -> Output:
        """What the call just made left behind; logits leave the device only where they have to."""
        if self._token is not None and not inputs.logits:
            return Output(int(self._token.numpy()[0, 0]), kept)
        logits: NDArray[Any] = self._logits.numpy()[0, 0]
        return Output(likeliest(logits), kept, logits.copy() if inputs.logits else None)

    def _bind(self, image: EncodedImage | None) -> Any:
        """A binding of the decoder with all but ids, lengths and caches."""
        binding, shown = self._decoder.io_binding(), image or self._no_image
        given = {"visual": shown.visual, "visual_indices": shown.indices}
        taken = {"logits": self._logits, "token": self._token}
        for tensor in self._graph.inputs:
            if tensor.role in given:
                binding.bind_ortvalue_input(tensor.name, given[tensor.role])
        for tensor in self._graph.outputs:
            if tensor.role in taken:
                binding.bind_ortvalue_output(tensor.name, taken[tensor.role])
        return binding

    def _host(self, array: NDArray[Any]) -> Any:
        return self._value.ortvalue_from_numpy(np.ascontiguousarray(array))


class _Step:
    """A decode step bound once: three small inputs are written anew, the rest stays."""

    def __init__(self, backend: OrtBackend) -> None:
        host, layers = backend._host, backend.record.layers
        self.decoder, self.binding = backend._decoder, backend._bind(None)
        names = {tensor.role: tensor.name for tensor in backend._graph.inputs}
        self.binding.bind_ortvalue_input(names["prefix_ids"], backend._no_ids)
        self.small = {
            names["text_ids"]: host(np.zeros((1, 1), np.int64)),
            names["position"]: host(np.zeros(1, np.int64)),
            names["lengths"]: host(np.zeros(layers, np.int64)),
        }
        self.counts = host(backend._default)  # any: a step has no image
        if "counts" in names:
            self.binding.bind_ortvalue_input(names["counts"], self.counts)
        self.bound = False
        self.copies = backend.device != "cpu"  # binding copies an input to a GPU, as it is then

    def run(self, inputs: DecoderInputs, caches: OrtCaches) -> None:
        found = inputs.text_ids, np.array([inputs.position]), inputs.lengths
        for (name, value), array in zip(self.small.items(), found, strict=True):
            value.update_inplace(array)
            if self.copies or not self.bound:
                self.binding.bind_ortvalue_input(name, value)
        if caches.moving or not self.bound:
            caches.bind(self.binding, inputs.lengths, inputs.filled)
            self.bound = True
        self.decoder.run_with_iobinding(self.binding)


def _import() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(f"ONNX Runtime is not installed; {install('cpu')} (or [gpu])") from error
    return onnxruntime


def _options(ort: Any, manifest: Manifest, threads: int | None, profile: Path | None) -> Any:
    """Of a session."""
    options = ort.SessionOptions()
    if manifest.is_calibrated:
        # As written, so in floats: products of bytes add up in 16 bits on x86 without VNNI.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, os.fspath(profile)
    return options


def _providers(ort: Any, device: str) -> list[Any]:
    """Names of providers, or names with options: float32 products stay in float32, not TF32."""
    wanted = PROVIDERS[device]
    if wanted not in ort.get_available_providers():
        raise BackendError(
            f"this ONNX Runtime has no {wanted}, only {', '.join(ort.get_available_providers())};"
            f" pip uninstall onnxruntime, then {install('gpu')}"
        )
    if device == "cpu":
        return [wanted]
    _preload(ort)
    return [(wanted, {"use_tf32": "0"}), PROVIDERS["cpu"]]


def _preload(ort: Any) -> None:
    """Load CUDA's libraries from the packages that pip installs, where no loader looks for them."""
    if hasattr(ort, "preload_dlls"):
        with redirect_stdout(StringIO()):  # it prints what is not there, and may be elsewhere
            ort.preload_dlls()


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """BackendError in place of what ONNX Runtime raises: a kind per status code, and some plain."""
    try:
        yield
    except Exception as error:
        theirs = type(error).__module__.startswith("onnxruntime")
        if not theirs and not isinstance(error, (RuntimeError, ValueError, MemoryError)):
            raise
        raise BackendError(
            f"ONNX Runtime failed in {what} ({brief(error)}); where memory is short, shorten the"
            " prompt or export with a larger --cr"
        ) from error


def _session(ort: Any, bundle: Bundle, name: str, options: Any, providers: list[Any]) -> Any:
    try:
        session = ort.InferenceSession(os.fspath(bundle.file(name)), options, providers)
    except Exception as error:  # onnxruntime raises a kind per status code
        raise BackendError(
            f"ONNX Runtime {ort.__version__} refuses {bundle.file(name)}: {brief(error)}"
        ) from error
    wanted = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if session.get_providers()[0] != wanted:
        raise BackendError(
            f"{wanted} could not start (ONNX Runtime fell back to"
            f" {session.get_providers()[0]}); check the GPU's driver and CUDA libraries"
        )
    return session
