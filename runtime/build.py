"""`build`: a bundle's graphs become TensorRT engines in `BUNDLE/engines/<key>/`.

    vision.engine     one set of sizes
    join.engine       likewise; where it takes counts, a profile bounds them
    decoder.engine    two profiles over the same weights: prefill (and later turns), decode
    engine.json       who built it, for what, and the hash of each engine

A folder of engines is written under a hidden name and renamed, so it is whole or absent.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeprune.bundle import ENGINES, Bundle, sha256
from edgeprune.errors import BackendError, BundleError, CapacityError, SpecError
from edgeprune.files import replaced
from edgeprune.graphs import DECODER, JOIN, TensorRecord
from edgeprune.lowering import FLOAT8, TARGETS
from edgeprune.manifest import Manifest
from edgeprune.progress import Progress, silent
from edgeprune.runtime import trt as seam
from edgeprune.runtime.engines import RECORD, graphs, names, read, sources, whole
from edgeprune.runtime.onnx_dims import with_sizes
from edgeprune.runtime.text import Prompter

TEXT_CAPACITY = 512  # tokens of text, prompts and answers together, that the caches hold
PREFIX = 64  # tokens before the image, at least
STEP = 128  # tokens that the decode profile takes at most: one token exactly stores weights twice

Range = tuple[int, int, int]  # least, usual, most
Counts = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # likewise, of every layer
Profile = Mapping[str, Range | Counts]
"""Prefix, visual and text tokens of one call, past.0 ..., and counts where they are an input."""


@dataclass(frozen=True)
class BuildRequest:
    """What to compile, with what, and for which GPUs (none named: the backend's own choice)."""

    bundle: Path
    backend: str
    text_capacity: int = TEXT_CAPACITY
    compute: tuple[str, ...] = ()
    force: bool = False  # build again what is there
    drop_weights: bool = False  # remove weights.bin once engines are there
    decode_tokens: int = STEP  # that the decode profile takes at most

    def __post_init__(self) -> None:
        if self.decode_tokens < 1:
            raise SpecError(f"a decode profile takes at least 1 token; got {self.decode_tokens}")
        if self.text_capacity < 1:
            raise SpecError(f"--text-capacity is at least 1 token; got {self.text_capacity}")


@dataclass(frozen=True)
class Tensor:
    """One input or output of an engine; -1 is a size that a profile bounds."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Engine:
    """One compiled graph."""

    file: str
    bytes: int
    sha256: str
    seconds: float
    profiles: dict[str, dict[str, Range | Counts]]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Built:
    """Where the engines are, what engine.json says, and whether they were there before."""

    path: Path
    record: dict[str, Any]
    found: bool = False


def build(request: BuildRequest, report: Progress = silent) -> Built:
    """Compile a bundle, unless the same engines are there and whole."""
    trt = seam.load(request.backend)
    bundle = Bundle.open(request.bundle, verify=True)
    _check(bundle.manifest, request)
    target = bundle.path / ENGINES / _key(bundle.manifest, request, trt.__version__)
    if not request.force and (before := read(target)) and whole(before):
        return _finished(bundle, request, Built(target, before.record, found=True))
    bundle.require_weights("a build")
    capacities = [count + request.text_capacity for count in bundle.manifest.widest.counts]
    grows, cached = bundle.manifest.decoder.cache == "grow", bundle.manifest.graph.cached_layers
    sizes = {f"capacity.{layer}": capacities[layer] for layer in cached}
    growing = {layer: capacities[layer] for layer in cached if grows}
    profiles = size_ranges(bundle, request, growing)
    builder = _Builder(trt, request, bundle, report)
    with replaced(target) as draft:
        ranges = {"join": image_ranges(bundle.manifest), "decoder": profiles}
        made = {"decoder": {} if grows else sizes}  # sizes that are open in the graph
        engines = {
            name: builder.compile(name, made.get(name, {}), ranges.get(name, {}), draft)
            for name in names(bundle.manifest)
        }
        record = {
            "bundle": bundle.manifest.name,
            "backend": request.backend,
            "version": trt.__version__,
            "dtype": bundle.manifest.dtype,
            "compute": list(request.compute),
            "gpu": seam.gpu(),
            "text_capacity": request.text_capacity,
            "capacities": capacities,
            "graphs": graphs(bundle),
            "engines": {name: asdict(engine) for name, engine in engines.items()},
        }
        (draft / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return _finished(bundle, request, Built(target, record))


def _finished(bundle: Bundle, request: BuildRequest, built: Built) -> Built:
    """What was built, its weights removed where that is asked."""
    if request.drop_weights:
        bundle.drop_weights()
    return built


def _check(manifest: Manifest, request: BuildRequest) -> None:
    """Refuse at once what TensorRT would refuse after minutes, or its runtime could not drive."""
    if manifest.graph.output("token") is None:
        raise BackendError(
            f"{request.bundle} was exported for ONNX Runtime on a CPU; export it again with"
            " --target rtx, jetpack7 or jetpack6"
        )
    if manifest.dtype not in TARGETS[manifest.target].engines:
        raise BackendError(
            f"{request.bundle} is {manifest.dtype}, TensorRT's attention is fp16 or bf16;"
            " export it again with --dtype fp16 (or --target rtx)"
        )
    if "fp8" in (manifest.weights.tensors if manifest.weights else ()):
        gpus = request.compute or ((here,) if (here := seam.gpu()) else ())
        if older := [name for name in gpus if _capability(name) < FLOAT8]:
            raise BackendError(
                f"{request.bundle} has weights of float8, which GPUs have from compute capability"
                f" {FLOAT8[0]}.{FLOAT8[1]} on; this is for {older[0]}. Export it again with"
                " --weights int8:activations=on"
            )
    most = manifest.decoder.max_positions - max(s.image_positions for s in manifest.settings)
    if request.text_capacity > most:
        raise CapacityError(
            f"--text-capacity {request.text_capacity} is more than the {most} text tokens that"
            f" the model's {manifest.decoder.max_positions} positions leave beside the image"
        )


def _capability(name: str) -> tuple[int, int]:
    """`sm_87` or `SM87` -> (8, 7); what says no number counts as the newest."""
    digits = name.lower().removeprefix("sm").removeprefix("_")
    return (int(digits[:-1]), int(digits[-1])) if digits[1:].isdigit() else (99, 0)


def size_ranges(
    bundle: Bundle, request: BuildRequest, growing: Mapping[int, int]
) -> dict[str, Profile]:
    """Prefill takes later turns too, so it may have no image; both ranges end at one token.

    `growing` has, by the index of a layer, the most tokens of its cache where that is longer from
    call to call.
    """
    visual, most = bundle.manifest.widest.encoded, request.text_capacity
    prompter = Prompter(bundle.file("tokenizer.json"), bundle.manifest.text)
    prefix = prompter.first_turn("?")[0].size
    if prefix >= most:
        raise CapacityError(
            f"--text-capacity {most} leaves no room: {prefix} tokens stand before the image"
        )
    longest = min(max(PREFIX, prefix), most)
    counts = _counts(bundle.manifest, DECODER)
    return {
        "prefill": {
            **counts,
            "prefix": (0, prefix, longest),
            "visual": (0, visual, visual),
            "text": (1, min(64, most - prefix), most),
            **{f"past.{layer}": (0, 0, full) for layer, full in growing.items()},
        },
        "decode": {
            **counts,
            "prefix": (0, 0, longest),
            "visual": (0, 0, visual),
            "text": (1, 1, min(request.decode_tokens, most)),
            **{
                f"past.{layer}": (1, max(1, full - most // 2), full)
                for layer, full in growing.items()
            },
        },
    }


def image_ranges(manifest: Manifest) -> dict[str, Profile]:
    """The sizes of join.onnx: fixed, unless it takes the counts."""
    counts = _counts(manifest, JOIN)
    return {"image": counts} if counts else {}


def _counts(manifest: Manifest, graph: str) -> dict[str, Counts]:
    """The counts that a graph takes, over all ratios of the bundle."""
    if (taken := manifest.graphs[graph].input("counts")) is None:
        return {}
    ratios = list(zip(*(setting.prune.counts for setting in manifest.settings), strict=True))
    least, most = tuple(map(min, ratios)), tuple(map(max, ratios))
    return {taken.name: (least, manifest.prune.counts, most)}


def _key(manifest: Manifest, request: BuildRequest, version: str) -> str:
    """Folder name: backend, version, GPUs, dtype, and a hash of all that the engines depend on."""
    gpus = "+".join(request.compute) or seam.gpu() or "any"
    files = [manifest.files[f].sha256 for f in sources(manifest)]
    parts = [request.backend, version, gpus, manifest.dtype]
    sizes = f"{request.text_capacity} {request.decode_tokens}"
    everything = "\n".join([*parts, *files, sizes])
    return "-".join([*parts, hashlib.sha256(everything.encode()).hexdigest()[:12]])


class _Builder:
    """One TensorRT builder for all graphs of a bundle."""

    def __init__(self, trt: Any, request: BuildRequest, bundle: Bundle, report: Progress) -> None:
        self.trt, self.request, self.bundle, self.report = trt, request, bundle, report
        self.title = f"{seam.TITLES[request.backend]} {trt.__version__}"
        self.logger = seam.quiet_logger(trt)
        try:
            self.builder = trt.Builder(self.logger)
        except (RuntimeError, TypeError) as error:  # TensorRT's builder wants a GPU
            why = self.logger.errors[-1] if self.logger.errors else error
            raise BackendError(
                f"{self.title} cannot build here ({why}); build on a machine with a GPU"
            ) from error

    def compile(
        self, name: str, sizes: Mapping[str, int], profiles: dict[str, Profile], folder: Path
    ) -> Engine:
        """Parse one graph, build it, write it."""
        self.report(f"build {name}", 0, 1)
        start = time.perf_counter()
        network = self._parse(f"{name}.onnx", sizes)
        config = self._config(name)
        ends = self.bundle.manifest.graphs[f"{name}.onnx"].inputs
        shapes = {label: self._profile(config, ends, p) for label, p in profiles.items()}
        self.logger.errors.clear()
        plan = seam.compiled(self.builder, network, config, self._monitor)
        if plan is None:
            why = self.logger.errors[-1] if self.logger.errors else "no reason given"
            raise BackendError(f"{self.title} cannot build {name}.onnx: {why}")
        self._keep_timings(config)
        file = folder / f"{name}.engine"
        file.write_bytes(memoryview(plan))
        inputs = tuple(_tensor(network.get_input(i)) for i in range(network.num_inputs))
        outputs = tuple(_tensor(network.get_output(i)) for i in range(network.num_outputs))
        seconds = round(time.perf_counter() - start, 2)
        size = file.stat().st_size
        return Engine(file.name, size, sha256(file), seconds, shapes, inputs, outputs)

    def _parse(self, name: str, sizes: Mapping[str, int]) -> Any:
        trt, file = self.trt, self.bundle.file(name)
        network = self.builder.create_network(seam.strongly_typed(trt))
        self._parser = trt.OnnxParser(network, self.logger)  # owns the weights until built
        try:
            model = with_sizes(file.read_bytes(), sizes)
        except ValueError as error:
            raise BundleError(f"{file} is damaged ({error}); export the bundle again") from error
        if not self._parser.parse(model, str(file)):  # the path says where weights.bin is
            raise BackendError(f"{self.title} refuses {file}: {seam.refusals(self._parser)}")
        seam.narrow_indices(trt, network, self.bundle.manifest.graph)
        seam.let_fall_back(trt, network)
        return network

    def _config(self, name: str) -> Any:
        trt, config = self.trt, self.builder.create_builder_config()
        self._monitor = seam.monitor(trt, f"build {name}", self.report)  # TensorRT keeps no hold
        config.progress_monitor = self._monitor
        if self.request.compute:
            config.num_compute_capabilities = len(self.request.compute)
            for index, target in enumerate(self._targets()):
                if not config.set_compute_capability(target, index):
                    raise BackendError(f"{self.title} takes no --compute {target.name} here")
        if self.request.backend == "trt":  # TensorRT-RTX measures on the device, at load
            known = self._timings.read_bytes() if self._timings.is_file() else b""
            config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
        return config

    def _targets(self) -> list[Any]:
        kind = getattr(self.trt, "ComputeCapability", None)
        if kind is None:
            raise BackendError(f"{self.title} builds for this machine's GPU only; omit --compute")
        known = {n: t for n, t in kind.__members__.items() if n not in ("NONE", "CURRENT")}
        wrong = [name for name in self.request.compute if name not in known]
        if wrong:
            raise BackendError(
                f"--compute is of {', '.join(sorted(known))} for {self.title}; got {wrong[0]!r}"
            )
        return [known[name] for name in self.request.compute]

    def _profile(
        self, config: Any, inputs: Sequence[TensorRecord], profile: Profile
    ) -> dict[str, Range | Counts]:
        """Add one profile; what it bounds, by input, in tokens."""
        made = self.builder.create_optimization_profile()
        bounds: list[dict[str, Any]] = [
            {name: bound[i] for name, bound in profile.items()} for i in range(3)
        ]
        for tensor in inputs:
            if tensor.role == "counts":  # values that decide shapes
                made.set_shape_input(tensor.name, *(list(b[tensor.name]) for b in bounds))
            elif {dim for dim in tensor.dims if isinstance(dim, str)} & profile.keys():
                made.set_shape(tensor.name, *map(tensor.shape, bounds))
        if config.add_optimization_profile(made) < 0:
            raise BackendError(f"{self.title} refuses the profile {dict(profile)}")
        return dict(profile)

    @property
    def _timings(self) -> Path:
        return self.bundle.path / ENGINES / "timing.cache"

    def _keep_timings(self, config: Any) -> None:
        """Kernel times, so that the next build on this device takes them as measured."""
        if self.request.backend == "trt":
            draft = self._timings.with_suffix(".draft")
            draft.write_bytes(memoryview(config.get_timing_cache().serialize()))
            draft.replace(self._timings)


def _tensor(tensor: Any) -> Tensor:
    return Tensor(tensor.name, tuple(tensor.shape), tensor.dtype.name)
