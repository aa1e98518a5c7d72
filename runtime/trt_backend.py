"""TensorRT and TensorRT-RTX: everything stays on the GPU but token ids.

One block of memory is allocated when a bundle is opened and divided up: inputs, outputs, caches,
and the scratch memory that all runs share. The vision engine writes its tokens where the decoder
reads them. A cache that is written in place has one address for past and present, so every decode
step is the same work: it is recorded once as a CUDA graph and replayed, with one small copy in (the
token, its position, the lengths) and 8 bytes out (the likeliest token).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.bundle import Bundle, Manifest
from edgeprune.errors import BackendError, CapacityError
from edgeprune.runtime import elements, engines, gpu, trt
from edgeprune.runtime.backend import Chunk, Ids, Output

ALIGNMENT = 256  # bytes; TensorRT wants inputs and outputs so
WORD = 8  # bytes of an int64
ADVICE = {
    "prefix": "put <image> earlier in it",
    "text": "shorten it, or build with a larger --text-capacity",
}
"""Against a prompt with too many tokens before the picture, or after it."""


class TrtBackend:
    """A bundle's two engines on the first GPU; `kind` is trt or trt-rtx."""

    def __init__(self, bundle: Bundle, kind: str) -> None:
        self.name, self.manifest, self.device = kind, bundle.manifest, gpu.connect(kind)
        self.record, self.dtype = bundle.manifest.decoder, bundle.manifest.dtype
        version = str(trt.load(kind).__version__)
        machine = engines.Machine(kind, trt.TITLES[kind], version, self.device.compute)
        found = engines.find(bundle, machine)
        self.capacities: list[int] = found.record["capacities"]
        self.text_capacity: int | None = found.record["text_capacity"]
        made: dict[str, Any] = found.record["engines"]
        self.build_seconds: float | None = sum(engine["seconds"] for engine in made.values())
        self.limits = made["decoder"]["profiles"]["prefill"]
        sizes = _sizes(bundle.manifest, self.capacities, self.limits)
        files = sum(engine["bytes"] for engine in made.values())
        self._check_memory(found, files + sum(sizes.values()))
        vision, decoder = (self.device.load(found.file(n)) for n in ("vision", "decoder"))
        sizes["scratch"] = max(vision.scratch, decoder.scratch)
        self._check_memory(found, sum(sizes.values()))
        self.at = _arena(self.device, sizes)
        (self._vision,) = vision.executions(self.at["scratch"])
        self._prefill, self._decode = decoder.executions(self.at["scratch"])
        self._caches = _Caches(bundle.manifest, self.capacities, self.at)
        self._token = self.device.pinned(WORD).view(np.int64)
        self._bind()
        self._step = _Step(self)

    def see(self, pixels: NDArray[np.float32]) -> Ids:
        self.device.upload(self.at["pixels"], elements.to_stored(pixels, self.dtype))
        self._vision.run()
        kept = np.zeros(self.manifest.prune.encoded, np.int64)
        self.device.download(kept, self.at["places"])
        self.device.wait()
        return kept

    def reserve(self, capacities: Sequence[int]) -> None:
        for layer, (wanted, held) in enumerate(zip(capacities, self.capacities, strict=True)):
            if wanted > held:
                raise CapacityError(
                    f"the engines' cache of layer {layer + 1} holds {held} tokens, the dialogue"
                    f" needs {wanted}; ask for fewer, or build with a larger --text-capacity"
                )

    def run(self, chunk: Chunk) -> Output:
        single = not chunk.with_picture and chunk.text_ids.shape[1] == 1
        if single and not chunk.prefix_ids.size:
            self._step.run(chunk)
            return Output(self._logits, (), int(self._token[0]))
        kept = self._read(chunk)
        return Output(self._logits, kept, int(self._token[0]))

    def cache_bytes(self) -> int:
        return self._caches.bytes

    def close(self) -> None:
        del self._vision, self._prefill, self._decode, self._step  # before the memory they work on
        self.device.close()

    def _read(self, chunk: Chunk) -> tuple[Ids, ...]:
        """A prefill or a later turn: the kept places of each site."""
        visual = self.manifest.prune.encoded if chunk.with_picture else 0
        for name, ids in (("prefix", chunk.prefix_ids), ("text", chunk.text_ids)):
            if ids.size > (most := self.limits[name][2]):
                raise CapacityError(
                    f"the engines read {most} {name} tokens at once, the prompt has {ids.size};"
                    f" {ADVICE[name]}"
                )
            self.device.upload(self.at[f"{name}_ids"], np.ascontiguousarray(ids))
            self._prefill.shape(f"{name}_ids", (1, ids.size))
        self.device.upload(self.at["position"], np.array([chunk.position]))
        self.device.upload(self.at["lengths"], chunk.lengths)
        self._prefill.shape("visual", (1, visual, self.record.width))
        if self.record.span is not None:
            self._prefill.shape("places", (visual,))
        self._caches.prepare(self._prefill, chunk.lengths)
        self._prefill.run()
        self.device.download(self._token, self.at["token"])
        kept = tuple(np.zeros(n if visual else 0, np.int64) for n in _survivors(self.manifest))
        for name, places in zip(self.manifest.prune.kept_outputs, kept, strict=True):
            self.device.download(places, self.at[name])
        self.device.wait()
        return kept

    def _logits(self) -> NDArray[Any]:
        """Those of the last call, [vocabulary]."""
        stored = np.zeros(self.record.vocabulary, elements.STORED[self.dtype])
        self.device.download(stored, self.at["logits"])
        self.device.wait()
        return elements.from_stored(stored, self.dtype)

    def _bind(self) -> None:
        """Give every input and output its address; those of caches that grow change later."""
        for name, place in (("pixels", "pixels"), ("visual", "visual"), ("kept", "places")):
            self._vision.address(name, self.at[place])
        names = ["visual", "logits", "token", *self.manifest.prune.kept_outputs]
        if self.record.span is not None:
            names.append("places")
        for execution in (self._prefill, self._decode):
            for name in names:
                execution.address(name, self.at[name])
            self._caches.bind(execution)
        for name in ("prefix_ids", "text_ids", "position", "lengths"):
            self._prefill.address(name, self.at[name])

    def _check_memory(self, found: engines.Engines, need: int) -> None:
        if need > (free := self.device.free_bytes()):
            raise BackendError(
                f"{found.folder} needs {need / 1e9:.2f} GB of GPU memory, {free / 1e9:.2f} GB are"
                " free; end other programs, delete it and build with a smaller --text-capacity, or"
                " export with a larger --cr"
            )


class _Step:
    """One decode step: what it reads lies in one piece of memory, so that one copy fills it."""

    def __init__(self, backend: TrtBackend) -> None:
        self.device, layers = backend.device, backend.record.layers
        self.execution, self.caches = backend._decode, backend._caches
        self.at, self.token = backend.at, backend._token
        self.host = self.device.pinned(2 * ALIGNMENT + WORD * layers)
        words, gap = self.host.view(np.int64), ALIGNMENT // WORD
        self.text, self.position, self.lengths = words[:1], words[gap : gap + 1], words[2 * gap :]
        self.replay: Callable[[], None] | None = None
        execution, start = self.execution, self.at["step"]
        for place, name in enumerate(("text_ids", "position", "lengths")):
            execution.address(name, start + place * ALIGNMENT)
        execution.address("prefix_ids", self.at["prefix_ids"])
        execution.shape("prefix_ids", (1, 0))
        execution.shape("text_ids", (1, 1))
        execution.shape("visual", (1, 0, backend.record.width))
        if backend.record.span is not None:
            execution.shape("places", (0,))

    def run(self, chunk: Chunk) -> None:
        self.text[0], self.position[0] = chunk.text_ids[0, 0], chunk.position
        self.lengths[:] = chunk.lengths
        if self.replay is not None:
            self.replay()
        else:
            self.caches.prepare(self.execution, chunk.lengths)
            self._queue()
        self.device.wait()
        if self.replay is None and not self.caches.grows and self.execution.recordable():
            self.replay = self.device.record(self._queue)

    def _queue(self) -> None:
        self.device.upload(self.at["step"], self.host)
        self.execution.run()
        self.device.download(self.token, self.at["token"])


class _Caches:
    """Addresses of the KV caches: past and present at one, or at two that change places."""

    def __init__(
        self, manifest: Manifest, capacities: Sequence[int], at: Mapping[str, int]
    ) -> None:
        record = manifest.decoder
        self.grows, self.record = record.cache == "grow", record
        row = record.kv_heads * record.head_size * elements.SIZES[manifest.dtype]
        self.bytes = (2 if self.grows else 1) * sum(2 * n * row for n in capacities)
        names = [f"{kind}.{layer}" for layer in range(record.layers) for kind in ("key", "value")]
        self.pairs = {n: (at[n], at[f"{n}'" if self.grows else n]) for n in names}

    def bind(self, execution: gpu.Execution) -> None:
        for name, (past, present) in self.pairs.items():
            execution.address(f"past_{name}", past)
            execution.address(f"present_{name}", present)

    def prepare(self, execution: gpu.Execution, lengths: Ids) -> None:
        """For caches that grow: this call's shapes and addresses; the next one's are swapped."""
        if not self.grows:
            return
        self.bind(execution)
        for name, (past, present) in self.pairs.items():
            held = int(lengths[int(name.partition(".")[2])])
            shape = (1, self.record.kv_heads, held, self.record.head_size)
            execution.shape(f"past_{name}", shape)
            self.pairs[name] = present, past


def _sizes(
    manifest: Manifest, capacities: Sequence[int], limits: Mapping[str, Sequence[int]]
) -> dict[str, int]:
    """Bytes of every piece of memory, by name."""
    record, element = manifest.decoder, elements.SIZES[manifest.dtype]
    encoded, layers = manifest.prune.encoded, record.layers
    sizes = {
        "pixels": prod(manifest.image.shape) * element,
        "visual": encoded * record.width * element,
        "places": encoded * WORD,
        "prefix_ids": limits["prefix"][2] * WORD,
        "text_ids": limits["text"][2] * WORD,
        "position": WORD,
        "lengths": layers * WORD,
        "step": 2 * ALIGNMENT + layers * WORD,
        "logits": record.vocabulary * element,
        "token": WORD,
    }
    for name, count in zip(manifest.prune.kept_outputs, _survivors(manifest), strict=True):
        sizes[name] = count * WORD
    row = record.kv_heads * record.head_size * element
    for layer, capacity in enumerate(capacities):
        for name in (f"key.{layer}", f"value.{layer}"):
            sizes[name] = capacity * row
            if record.cache == "grow":
                sizes[f"{name}'"] = capacity * row
    return {name: max(1, size) + -max(1, size) % ALIGNMENT for name, size in sizes.items()}


def _survivors(manifest: Manifest) -> list[int]:
    """How many visual tokens each pruning site leaves."""
    layers = (int(name.partition(".")[2]) for name in manifest.prune.kept_outputs)
    return [manifest.prune.counts[layer - 1] for layer in layers]


def _arena(device: gpu.Gpu, sizes: Mapping[str, int]) -> dict[str, int]:
    """One allocation, divided up: the address of each piece."""
    base, at = device.allocate(sum(sizes.values())), {}
    for name, size in sizes.items():
        at[name] = base
        base += size
    return at
