"""GPU memory of the TensorRT backend: what calls share, an image's tokens, a dialogue's caches."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from math import prod

from edgeprune.bundle import Manifest
from edgeprune.runtime import elements, gpu
from edgeprune.runtime.backend import Ids

ALIGNMENT = 256  # bytes; TensorRT wants inputs and outputs so
WORD = 8  # bytes of an int64


class Block:
    """KV caches in one piece of memory: past and present at one address, or at two that change
    places. `replay` is the decode step recorded on these addresses."""

    def __init__(
        self, manifest: Manifest, capacities: Sequence[int], at: Mapping[str, int]
    ) -> None:
        record = manifest.decoder
        self.grows, self.record = record.cache == "grow", record
        row = record.kv_heads * record.head_size * elements.SIZES[manifest.dtype]
        self.bytes = (2 if self.grows else 1) * sum(2 * n * row for n in capacities)
        names = [f"{kind}.{layer}" for layer in range(record.layers) for kind in ("key", "value")]
        self.pairs = {n: (at[n], at[f"{n}'" if self.grows else n]) for n in names}
        self.replay: Callable[[], None] | None = None

    def prepare(self, execution: gpu.Execution, lengths: Ids) -> None:
        """Give a call its caches, and where they grow their shapes; the next call is swapped."""
        for name, (past, present) in self.pairs.items():
            execution.address(f"past_{name}", past)
            execution.address(f"present_{name}", present)
            if self.grows:
                held = int(lengths[int(name.partition(".")[2])])
                shape = (1, self.record.kv_heads, held, self.record.head_size)
                execution.shape(f"past_{name}", shape)
                self.pairs[name] = present, past


class TrtCaches:
    """A block for as long as one dialogue has it; closed or dropped, it goes to the next one."""

    def __init__(self, block: Block, spare: list[Block]) -> None:
        self.block = block
        self._release = weakref.finalize(self, spare.append, block)
        self._release.atexit = False

    def bytes(self) -> int:
        return self.block.bytes

    def close(self) -> None:
        self._release()


def shared_sizes(manifest: Manifest, limits: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Bytes of what all calls share, by name: one call at a time has it."""
    record, element = manifest.decoder, elements.SIZES[manifest.dtype]
    sizes = {
        "pixels": prod(manifest.image.shape) * element,
        "prefix_ids": limits["prefix"][2] * WORD,
        "text_ids": limits["text"][2] * WORD,
        "position": WORD,
        "lengths": record.layers * WORD,
        "step": step_bytes(record.layers),
        "logits": record.vocabulary * element,
        "token": WORD,
        "nothing": ALIGNMENT,  # stands for an image where there is none
    }
    for name, count in zip(manifest.prune.kept_outputs, survivors(manifest), strict=True):
        sizes[name] = count * WORD
    return _aligned(sizes)


def image_sizes(manifest: Manifest) -> dict[str, int]:
    """Bytes of an encoded image."""
    encoded, width = manifest.prune.encoded, manifest.decoder.width
    visual = encoded * width * elements.SIZES[manifest.dtype]
    return _aligned({"visual": visual, "places": encoded * WORD})


def cache_sizes(manifest: Manifest, capacities: Sequence[int]) -> dict[str, int]:
    """Bytes of one dialogue's caches."""
    record, sizes = manifest.decoder, dict[str, int]()
    row = record.kv_heads * record.head_size * elements.SIZES[manifest.dtype]
    for layer, capacity in enumerate(capacities):
        for name in (f"key.{layer}", f"value.{layer}"):
            sizes[name] = capacity * row
            if record.cache == "grow":
                sizes[f"{name}'"] = capacity * row
    return _aligned(sizes)


def _aligned(sizes: Mapping[str, int]) -> dict[str, int]:
    return {name: max(1, size) + -max(1, size) % ALIGNMENT for name, size in sizes.items()}


def step_bytes(layers: int) -> int:
    """A token, its position and the lengths, each where an input may begin."""
    return 2 * ALIGNMENT + layers * WORD


def survivors(manifest: Manifest) -> list[int]:
    """How many visual tokens each pruning site leaves."""
    layers = (int(name.partition(".")[2]) for name in manifest.prune.kept_outputs)
    return [manifest.prune.counts[layer - 1] for layer in layers]


def arena(device: gpu.Gpu, sizes: Mapping[str, int]) -> dict[str, int]:
    """One allocation, divided up: the address of each piece."""
    base, at = device.allocate(sum(sizes.values())), {}
    for name, size in sizes.items():
        at[name] = base
        base += size
    return at
