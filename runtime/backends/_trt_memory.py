"""GPU memory of the TensorRT backend: what calls share, an image's tokens, a dialogue's caches."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from edgeprune.graphs import DELTA, TensorRecord
from edgeprune.lowering import DTYPES
from edgeprune.manifest import Manifest
from edgeprune.runtime import gpu
from edgeprune.runtime.backend import Ids

ALIGNMENT = 256  # bytes; TensorRT wants inputs and outputs so
WORD = 8  # bytes of an int64
CACHES = ("past_", "present_")
"""Roles of caches begin so."""
CHANGED = "patches", "patch_indices"
"""Roles of what a call of vision_delta.onnx is given from the host."""
K = TypeVar("K")


class Block:
    """KV caches in one piece of memory: past and present at one address, or at two that change
    places. `replay` is the decode step recorded on these addresses.

    A state has two addresses that stay: an engine may still read the one when it writes the other,
    so what was written is copied back after a call, all states at once.
    """

    def __init__(
        self, manifest: Manifest, capacities: Sequence[int], at: Mapping[str, int]
    ) -> None:
        record = manifest.decoder
        self.grows, self.record = record.cache == "grow", record
        caches = manifest.graph.caches
        self.sizes = cache_sizes(manifest, capacities)
        self.bytes = sum(_bytes(manifest, capacities).values())
        self.pairs = {
            cache: (at[cache.past.name], at[(cache.present if self.grows else cache.past).name])
            for cache in caches
            if not cache.is_state
        }
        self.states = {
            state: (at[state.past.name], at[state.present.name])
            for state in caches
            if state.is_state
        }
        self.replay: Callable[[], None] | None = None

    def prepare(self, execution: gpu.Execution, lengths: Ids) -> None:
        """Give a call its caches, and where they grow their shapes; the next call is swapped."""
        for state, (past, present) in self.states.items():
            execution.address(state.past.name, past)
            execution.address(state.present.name, present)
        for cache, (past, present) in self.pairs.items():
            execution.address(cache.past.name, past)
            execution.address(cache.present.name, present)
            if self.grows:
                held = int(lengths[cache.index])
                shape = (1, self.record.kv_heads, held, self.record.head_size)
                execution.shape(cache.past.name, shape)
                self.pairs[cache] = present, past

    def keep_states(self, device: gpu.Gpu) -> None:
        """After a call: what it wrote is what the next one reads."""
        if self.states:
            past, present = next(iter(self.states.values()))  # the first of each
            size = sum(self.sizes[state.past.name] for state in self.states)
            device.copy(past, present, size)

    def copy(self, other: Block, device: gpu.Gpu) -> None:
        """What another block of these sizes holds."""
        theirs = other.pairs | other.states
        for cache, (past, _) in (self.pairs | self.states).items():
            device.copy(past, theirs[cache][0], self.sizes[cache.past.name])


class TrtCaches:
    """A block for as long as one dialogue has it; closed or dropped, it goes to the next one."""

    def __init__(self, block: Block, spare: list[Block]) -> None:
        self.block, self.closed = block, False
        self._release = weakref.finalize(self, spare.append, block)
        self._release.atexit = False

    def bytes(self) -> int:
        return self.block.bytes

    def close(self) -> None:
        self.closed = True
        self._release()


def shared_sizes(manifest: Manifest, limits: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Bytes of what all calls share, by name: one call at a time has it."""
    open_sizes = {"prefix": limits["prefix"][2], "text": limits["text"][2]}
    for site, count in survivors(manifest, manifest.widest.counts):
        open_sizes |= {dim: count for dim in site.dims if isinstance(dim, str)}
    decoder = (*manifest.graph.inputs, *manifest.graph.outputs)
    pixels = [tensor for tensor in manifest.vision.inputs if tensor.role == "pixels"]
    if DELTA in manifest.graphs:
        pixels += [t for t in manifest.graphs[DELTA].inputs if t.role in CHANGED]
    apart = "visual", "visual_indices", "counts"
    shared = (t for t in (*pixels, *decoder) if t.role not in apart)
    sizes = {t.name: t.bytes(open_sizes) for t in shared if not t.role.startswith(CACHES)}
    sizes |= {"step": step_bytes(manifest.decoder.layers), "nothing": ALIGNMENT}  # no image
    return _aligned(sizes)


def image_sizes(manifest: Manifest) -> dict[str, int]:
    """Bytes of an encoded image, by role, at the ratio that keeps most of it."""
    most = {"visual": manifest.widest.encoded}
    return _aligned({tensor.role: tensor.bytes(most) for tensor in manifest.join.outputs})


def tile_sizes(manifest: Manifest) -> dict[str, int]:
    """Bytes of what the vision engine gives for a tile, by role."""
    signals = (tensor for tensor in manifest.vision.outputs if tensor.layer is None)
    return _aligned({tensor.role: tensor.bytes({}) for tensor in signals})


def frame_sizes(manifest: Manifest) -> dict[tuple[str, int], int]:
    """Bytes of the keys and values that it gives for a frame, by `TensorRecord.cached`."""
    caches = (tensor for tensor in manifest.vision.outputs if tensor.layer is not None)
    return _aligned({tensor.cached: tensor.bytes({}) for tensor in caches})


def cache_sizes(manifest: Manifest, capacities: Sequence[int]) -> dict[str, int]:
    """Bytes of one dialogue's caches, by the input's name; by the output's too where they grow, and
    of states. All states before a call lie together, and all after it, in one order."""
    return _aligned(_bytes(manifest, capacities))


def _bytes(manifest: Manifest, capacities: Sequence[int]) -> dict[str, int]:
    """The same, not yet aligned."""
    record, sizes = manifest.decoder, dict[str, int]()
    row = record.kv_heads * record.head_size * DTYPES[manifest.dtype].bytes
    states = [cache for cache in manifest.graph.caches if cache.is_state]
    for cache in (cache for cache in manifest.graph.caches if not cache.is_state):
        ends = (cache.past, cache.present) if record.cache == "grow" else (cache.past,)
        sizes |= {end.name: capacities[cache.index] * row for end in ends}
    sizes |= {state.past.name: state.past.bytes({}) for state in states}
    return sizes | {state.present.name: state.present.bytes({}) for state in states}


def _aligned(sizes: Mapping[K, int]) -> dict[K, int]:
    return {name: max(1, size) + -max(1, size) % ALIGNMENT for name, size in sizes.items()}


def step_bytes(layers: int) -> int:
    """A token, its position and the lengths, each where an input may begin."""
    return 2 * ALIGNMENT + layers * WORD


def survivors(manifest: Manifest, counts: Sequence[int]) -> list[tuple[TensorRecord, int]]:
    """Each pruning site's output, and how many visual tokens the site leaves of `counts`."""
    return [(site, int(counts[site.layer - 1])) for site in manifest.graph.kept if site.layer]


def arena(device: gpu.Gpu, sizes: Mapping[K, int]) -> dict[K, int]:
    """One allocation, divided up: the address of each piece."""
    base, at = device.allocate(sum(sizes.values())), dict[K, int]()
    for name, size in sizes.items():
        at[name] = base
        base += size
    return at
