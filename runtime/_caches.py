"""KV caches as ONNX Runtime values, as long as they need to be.

The CPU provider's Attention works over the whole cache, so every slot beyond the tokens costs time:
a cache is copied to a longer block now and then. A cache that the graph makes longer at every call
goes back and forth between two blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.bundle import DecoderRecord
from edgeprune.runtime.backend import Ids

STEP = 64
"""Caches hold a multiple of so many tokens."""

Array = NDArray[Any]


class Caches:
    """Keys and values of every layer, by name (`key.0`, ...), past and present in one block."""

    moving = False  # whether every call binds other blocks

    def __init__(self, ort: Any, record: DecoderRecord, element: type, device: str) -> None:
        self.value, self.record, self.element, self.device = ort.OrtValue, record, element, device
        self.values: dict[str, Any] = {}
        self.capacities = [0] * record.layers

    def reserve(self, needed: Sequence[int]) -> bool:
        """Hold so many tokens in each layer, and not many more; True where a value is new."""
        changed = False
        for layer, tokens in enumerate(needed):
            capacity = tokens + -tokens % STEP
            if not capacity <= self.capacities[layer] <= capacity + STEP:
                self.capacities[layer], changed = capacity, True
                for name in (f"key.{layer}", f"value.{layer}"):
                    self._resize(name, capacity)
        return changed

    def bind(self, binding: Any, lengths: Ids, after: Ids) -> None:
        """Bind past and present of a call: `lengths` tokens of each layer become `after`."""
        for name, cache in self.values.items():
            binding.bind_ortvalue_input(f"past_{name}", cache)
            binding.bind_ortvalue_output(f"present_{name}", cache)  # written in place

    def bytes(self) -> int:
        """Bytes that all caches take at their present capacities."""
        row = self.record.kv_heads * self.record.head_size * np.dtype(self.element).itemsize
        return sum(2 * capacity * row for capacity in self.capacities)

    def _resize(self, name: str, capacity: int) -> None:
        """Another block, with what is cached at its start."""
        block: Array = np.zeros(self._shape(capacity), self.element)
        if name in self.values:
            cached = self.values[name].numpy()[:, :, :capacity]
            block[:, :, : cached.shape[2]] = cached
        self.values[name] = self.value.ortvalue_from_numpy(block, self.device)

    def _shape(self, tokens: int) -> tuple[int, ...]:
        return 1, self.record.kv_heads, tokens, self.record.head_size


class GrowingCaches(Caches):
    """Past [1, kv_heads, length, head] lies in one block, present in the other; they swap."""

    moving = True

    def __init__(self, ort: Any, record: DecoderRecord, element: type, device: str) -> None:
        super().__init__(ort, record, element, device)
        self.others: dict[str, Any] = {}  # where the next present goes

    def bind(self, binding: Any, lengths: Ids, after: Ids) -> None:
        for name, past in self.values.items():
            layer, present = int(name.partition(".")[2]), self.others[name]
            before, behind = self._shape(int(lengths[layer])), self._shape(int(after[layer]))
            place = self.device, 0, self.element
            binding.bind_input(f"past_{name}", *place, before, past.data_ptr())
            binding.bind_output(f"present_{name}", *place, behind, present.data_ptr())
            self.values[name], self.others[name] = present, past

    def _resize(self, name: str, capacity: int) -> None:
        """Two other blocks; what is cached lies without gaps at the start of the first."""
        block: Array = np.zeros(self._shape(capacity), self.element)
        if name in self.values:
            cached = self.values[name].numpy().reshape(-1)[: block.size]
            block.reshape(-1)[: cached.size] = cached
        self.others[name] = self.value.ortvalue_from_numpy(np.zeros_like(block), self.device)
        self.values[name] = self.value.ortvalue_from_numpy(block, self.device)


def make(ort: Any, record: DecoderRecord, element: type, device: str) -> Caches:
    """The caches of a decoder, as its manifest says that they are kept."""
    kind = GrowingCaches if record.cache == "grow" else Caches
    return kind(ort, record, element, device)
