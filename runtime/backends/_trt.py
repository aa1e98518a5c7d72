"""TensorRT and TensorRT-RTX: everything stays on the GPU but token ids.

One block of memory is allocated when a bundle is opened and divided up: inputs, outputs and the
scratch memory that all runs share. Each dialogue has a block of caches, each encoded image one of
tokens, which the join engine writes where the decoder reads them; a block that is given back goes
to the next dialogue or image. A cache that is written in place has one address for past and
present, so every decode step of a dialogue is the same work: it is recorded once as a CUDA graph
and replayed, with one small copy in (the token, its position, the lengths) and 8 bytes out (the
likeliest token).
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.bundle import Bundle
from edgeprune.errors import BackendError, CapacityError
from edgeprune.graphs import DELTA, TensorRecord
from edgeprune.runtime import dtypes, engines, gpu, trt
from edgeprune.runtime.backend import (
    ChangedPatches,
    DecoderInputs,
    EncodedImage,
    EncodedTile,
    Ids,
    Output,
)
from edgeprune.runtime.backends._trt_memory import (
    ALIGNMENT,
    CHANGED,
    WORD,
    Block,
    K,
    TrtCaches,
    arena,
    cache_sizes,
    frame_sizes,
    image_sizes,
    shared_sizes,
    step_bytes,
    survivors,
    tile_sizes,
)

RUNS = ("fp32", "fp16", "bf16")
"""Dtypes of the bundles that it runs, where the target has engines of them."""
ADVICE = {
    "prefix": "put <image> earlier in it",
    "text": "shorten it, or build with a larger --text-capacity",
}
"""Against a prompt with too many tokens before the image, or after it."""


class TrtBackend:
    """A bundle's engines on the first GPU; `kind` is trt or trt-rtx."""

    def __init__(self, bundle: Bundle, kind: str) -> None:
        self.name, self.manifest, self.device = kind, bundle.manifest, gpu.connect(kind)
        self.record, self.dtype = bundle.manifest.decoder, bundle.manifest.dtype
        version = str(trt.load(kind).__version__)
        machine = engines.Machine(kind, trt.TITLES[kind], version, self.device.compute)
        self._found = engines.find(bundle, machine)
        record: dict[str, Any] = self._found.record
        self.capacities: list[int] = record["capacities"]
        self.text_capacity: int | None = record["text_capacity"]
        made: dict[str, Any] = record["engines"]
        self.build_seconds: float | None = sum(engine["seconds"] for engine in made.values())
        self.limits = made["decoder"]["profiles"]["prefill"]
        sizes = shared_sizes(bundle.manifest, self.limits)
        self._image_sizes = image_sizes(bundle.manifest)
        self._tile_sizes = tile_sizes(bundle.manifest)
        self._frame_sizes = frame_sizes(bundle.manifest)
        self._cache_sizes = cache_sizes(bundle.manifest, self.capacities)
        one = sum(sum(some.values()) for some in (sizes, self._image_sizes, self._cache_sizes))
        one += bundle.manifest.encoder.tiles * sum(self._tile_sizes.values())
        frames = bundle.manifest.encoder.tiles + 1  # of all tiles, and the next of one
        one += frames * sum(self._frame_sizes.values())
        self._check_memory(sum(engine["bytes"] for engine in made.values()) + one)
        names = engines.names(bundle.manifest)
        loaded = {name: self.device.load(self._found.file(name)) for name in names}
        sizes["scratch"] = max(engine.scratch for engine in loaded.values())
        self._check_memory(one + sizes["scratch"])
        self.at = arena(self.device, sizes)
        runs = {name: one.executions(self.at["scratch"]) for name, one in loaded.items()}
        (self._vision,), (self._join,) = runs["vision"], runs["join"]
        self._prefill, self._decode = runs["decoder"]
        self._changed = runs["vision_delta"][0] if "vision_delta" in runs else None
        self._token = self.device.pinned(WORD).view(np.int64)
        self._step = _StepInputs(self)
        self._default = np.array(bundle.manifest.prune.counts)
        self._blocks = list[Block]()
        self._spare_images, self._spare_blocks = list[dict[str, int]](), list[Block]()
        self._spare_tiles = list[dict[str, int]]()
        self._spare_frames = list[dict[tuple[str, int], int]]()
        self._bind()

    def encode_tile(self, pixels: NDArray[np.float32], *, caches: bool = False) -> EncodedTile:
        self.device.upload(self.at["pixels"], dtypes.to_stored(pixels, self.dtype))
        return self._encoded(self._vision, self.manifest.vision.outputs, caches=caches)

    def encode_changed(self, tile: EncodedTile, changed: ChangedPatches) -> EncodedTile:
        assert tile.caches is not None and self._changed is not None  # where the bundle has them
        record = self.manifest.graphs[DELTA]
        pixels = dtypes.to_stored(changed.pixels, self.dtype)
        given = dict(zip(CHANGED, (pixels, changed.indices), strict=True))
        for tensor in record.inputs:
            if tensor.role in given:
                at = self.at[tensor.name]
                self.device.upload(at, given[tensor.role])
            elif tensor.layer is not None:
                at = tile.caches[tensor.cached]
            else:
                at = tile.signals[tensor.role.removeprefix("previous_")]
            self._changed.address(tensor.name, at)
        return self._encoded(self._changed, record.outputs, caches=True)

    def _encoded(
        self, execution: gpu.Execution, outputs: Sequence[TensorRecord], *, caches: bool
    ) -> EncodedTile:
        """What an engine gives for a tile, its inputs bound. An engine writes all outputs, so there
        is memory for caches whether they are asked for or not."""
        at, holder = self._held(self._spare_tiles, self._tile_sizes, "a further tile")
        kept, other = dict[tuple[str, int], int](), None
        if self._frame_sizes:
            kept, other = self._held(self._spare_frames, self._frame_sizes, "a further frame")
        for tensor in outputs:
            where = at[tensor.role] if tensor.layer is None else kept[tensor.cached]
            execution.address(tensor.name, where)
        execution.run()
        self.device.wait()
        return EncodedTile(at, kept, (holder, other)) if caches else EncodedTile(at, None, holder)

    def join(self, tiles: Sequence[EncodedTile], counts: Ids | None = None) -> EncodedImage:
        at, holder = self._held(self._spare_images, self._image_sizes, "a further image")
        encoded, counts = self.manifest.prune.encoded, self._default if counts is None else counts
        for tensor in self.manifest.join.inputs:
            if tensor.tile is None:  # all others are signals of a tile
                self._join.values(tensor.name, counts)
                encoded = int(counts[0])
            else:
                self._join.address(tensor.name, tiles[tensor.tile - 1].signals[tensor.role])
        for tensor in self.manifest.join.outputs:
            self._join.address(tensor.name, at[tensor.role])
        self._join.run()
        kept = np.zeros(encoded, np.int64)
        self.device.download(kept, at["visual_indices"])
        self.device.wait()
        return EncodedImage(at["visual"], at["visual_indices"], kept, holder=holder)

    def _held(
        self, spare: list[dict[K, int]], sizes: Mapping[K, int], what: str
    ) -> tuple[dict[K, int], _Holder]:
        """Memory that goes back to `spare` once nobody can read it."""
        at = spare.pop() if spare else self._more(sizes, what)
        holder = _Holder()
        weakref.finalize(holder, spare.append, at).atexit = False
        return at, holder

    def caches(self) -> TrtCaches:
        spare = self._spare_blocks
        if not spare:
            at = self._more(self._cache_sizes, "a further dialogue")
            spare.append(Block(self.manifest, self.capacities, at))
            self._blocks += spare
        return TrtCaches(spare.pop(), spare)

    def copy(self, caches: TrtCaches, lengths: Ids) -> TrtCaches:
        twin = self.caches()
        twin.block.copy(caches.block, self.device)
        self.device.wait()
        return twin

    def run(self, inputs: DecoderInputs, caches: TrtCaches) -> Output:
        self._check_capacities(inputs.filled)
        kept: tuple[Ids, ...] = ()
        if inputs.is_step:
            self._run_step(inputs, caches.block)
        else:
            kept = self._read(inputs, caches.block)
        logits = self._logits() if inputs.logits else None
        return Output(int(self._token[0]), kept, logits)

    def close(self) -> None:
        del self._vision, self._changed, self._join  # before the memory they work on
        del self._prefill, self._decode
        for block in self._blocks:
            block.replay = None
        self.device.close()

    def _read(self, inputs: DecoderInputs, block: Block) -> tuple[Ids, ...]:
        """A prefill or a later turn: the kept positions of each site."""
        image, execution = inputs.image, self._prefill
        self._check_profile(inputs)
        for name, ids in (("prefix_ids", inputs.prefix_ids), ("text_ids", inputs.text_ids)):
            self.device.upload(self.at[name], np.ascontiguousarray(ids))
            execution.shape(name, (1, ids.size))
        self.device.upload(self.at["position"], np.array([inputs.position]))
        self.device.upload(self.at["lengths"], inputs.lengths)
        visual = 0 if image is None else image.kept.size
        counts = self._default if inputs.counts is None else inputs.counts
        self._count(execution, counts)
        self._show(execution, image, visual)
        block.prepare(execution, inputs.lengths)
        execution.run()
        block.keep_states(self.device)
        self.device.download(self._token, self.at["token"])
        kept = list[Ids]()
        for site, count in survivors(self.manifest, counts.tolist()):
            kept.append(np.zeros(count if visual else 0, np.int64))
            self.device.download(kept[-1], self.at[site.name])
        self.device.wait()
        return tuple(kept)

    def _run_step(self, inputs: DecoderInputs, block: Block) -> None:
        """One decode step: the first of a block is run as it is, then recorded and replayed."""
        self._step.fill(inputs)
        if block.replay is not None:
            block.replay()
        else:
            block.prepare(self._decode, inputs.lengths)
            self._queue_step(block)
        self.device.wait()
        if block.replay is None and not block.grows and self._decode.recordable():
            block.replay = self.device.record(partial(self._queue_step, block))

    def _queue_step(self, block: Block) -> None:
        self.device.upload(self.at["step"], self._step.host)
        self._decode.run()
        block.keep_states(self.device)
        self.device.download(self._token, self.at["token"])

    def _count(self, execution: gpu.Execution, counts: Ids) -> None:
        """Tell a call the counts of its image, where the graph takes them."""
        if (taken := self.manifest.graph.input("counts")) is not None:
            execution.values(taken.name, counts)

    def _show(self, execution: gpu.Execution, image: EncodedImage | None, visual: int) -> None:
        """Let a call read an image's tokens; without an image it reads none, wherever they lie."""
        given = {"visual": image.visual, "visual_indices": image.indices} if image else {}
        for tensor in self.manifest.graph.inputs:
            if tensor.role in ("visual", "visual_indices"):
                execution.shape(tensor.name, tensor.shape({"visual": visual}))
                execution.address(tensor.name, given.get(tensor.role, self.at["nothing"]))

    def _logits(self) -> NDArray[Any]:
        """Those of the last call, [vocabulary]."""
        stored = np.zeros(self.record.vocabulary, dtypes.stored_type(self.dtype))
        self.device.download(stored, self.at["logits"])
        self.device.wait()
        return dtypes.from_stored(stored, self.dtype)

    def _bind(self) -> None:
        """Give every input and output that all calls share its address and, in steps, its shape."""
        self._vision.address("pixels", self.at["pixels"])
        for execution in (self._prefill, self._decode):
            for tensor in self.manifest.graph.outputs:
                if tensor.name in self.at:  # all but the caches
                    execution.address(tensor.name, self.at[tensor.name])
        for name in ("prefix_ids", "text_ids", "position", "lengths"):
            self._prefill.address(name, self.at[name])
        self._decode.address("prefix_ids", self.at["prefix_ids"])
        self._decode.shape("prefix_ids", (1, 0))
        self._decode.shape("text_ids", (1, 1))
        for index, name in enumerate(("text_ids", "position", "lengths")):
            self._decode.address(name, self.at["step"] + index * ALIGNMENT)
        self._show(self._decode, None, 0)
        self._count(self._decode, self._default)  # any: a step has no image

    def _more(self, sizes: Mapping[K, int], what: str) -> dict[K, int]:
        """Memory for what comes to a running engine."""
        need, free = sum(sizes.values()), self.device.free_bytes()
        if need > free:
            raise BackendError(
                f"{what} needs {need / 1e9:.2f} GB of GPU memory, {free / 1e9:.2f} GB are free;"
                " close a session of this engine, which leaves its memory to the next"
            )
        return arena(self.device, sizes)

    def _check_capacities(self, filled: Ids) -> None:
        for layer, (wanted, held) in enumerate(zip(filled, self.capacities, strict=True)):
            if wanted > held:
                raise CapacityError(
                    f"the engines' cache of layer {layer + 1} holds {held} tokens, the dialogue"
                    f" needs {wanted}; ask for fewer, or build with a larger --text-capacity"
                )

    def _check_profile(self, inputs: DecoderInputs) -> None:
        for name, ids in (("prefix", inputs.prefix_ids), ("text", inputs.text_ids)):
            if ids.size > (most := self.limits[name][2]):
                raise CapacityError(
                    f"the engines read {most} {name} tokens at once, the prompt has {ids.size};"
                    f" {ADVICE[name]}"
                )

    def _check_memory(self, need: int) -> None:
        if need > (free := self.device.free_bytes()):
            raise BackendError(
                f"{self._found.folder} needs {need / 1e9:.2f} GB of GPU memory,"
                f" {free / 1e9:.2f} GB are free; end other programs, delete it and build with a"
                " smaller --text-capacity, or export with a larger --cr"
            )


class _StepInputs:
    """What a decode step reads: it lies in one piece of memory, so that one copy fills it."""

    def __init__(self, backend: TrtBackend) -> None:
        self.host = backend.device.pinned(step_bytes(backend.record.layers))
        words, gap = self.host.view(np.int64), ALIGNMENT // WORD
        self.text, self.position, self.lengths = words[:1], words[gap : gap + 1], words[2 * gap :]

    def fill(self, inputs: DecoderInputs) -> None:
        self.text[0], self.position[0] = inputs.text_ids[0, 0], inputs.position
        self.lengths[:] = inputs.lengths


class _Holder:
    """Held by whoever may still read an image or a tile."""
