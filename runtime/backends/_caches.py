"""KV caches as ONNX Runtime values, as long as they need to be.

The CPU provider's Attention works over the whole cache, so every slot beyond the tokens costs time:
a cache is copied to a longer block now and then. A cache that the graph makes longer at every call
goes back and forth between two blocks. Blocks are made and copied on the device where they lie.

A state of a layer without attention has one size and one block: the graph reads it in one node,
from which all that it writes there is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeprune.graphs import CacheRecord
from edgeprune.manifest import DecoderRecord
from edgeprune.runtime import dtypes
from edgeprune.runtime.backend import Ids
from edgeprune.runtime.backends._copy_graph import INPUT, OUTPUT, SPARE, copy_graph

STEP = 64
"""Caches hold a multiple of so many tokens."""


@dataclass(frozen=True)
class Device:
    """Where caches lie, and what copies there; `element` is the numpy type of what they hold."""

    ort: Any
    name: str  # cpu, cuda
    element: type
    copier: Any  # an InferenceSession of `copy_graph`

    @classmethod
    def open(cls, ort: Any, name: str, element: type, providers: list[Any]) -> Device:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        copier = ort.InferenceSession(copy_graph(element), options, providers)
        return cls(ort, name, element, copier)

    def block(self, shape: tuple[int, ...], element: type | None = None) -> Any:
        """Memory with nothing in it yet, for another type of numbers where one is named."""
        kind = element or self.element
        return self.ort.OrtValue.ortvalue_from_shape_and_type(shape, kind, self.name)

    def copy(self, source: Any, held: tuple[int, ...], target: Any, spare: int) -> None:
        """The first elements of `source` as [1, heads, n, head], and behind them `spare` tokens of
        zeros, into `target`."""
        behind = (*held[:2], spare, held[3])
        longer = (*held[:2], held[2] + spare, held[3])
        binding, device = self.copier.io_binding(), (self.name, 0, self.element)
        binding.bind_input(INPUT, *device, held, source.data_ptr())
        binding.bind_cpu_input(SPARE, np.array(behind))
        binding.bind_output(OUTPUT, *device, longer, target.data_ptr())
        self.copier.run_with_iobinding(binding)


class OrtCaches:
    """Keys and values or state of every layer, past and present in one block."""

    moving = False  # whether every call binds other blocks
    blocks = 1  # for each cache

    def __init__(
        self, device: Device, record: DecoderRecord, caches: Sequence[CacheRecord]
    ) -> None:
        self.device, self.record = device, record
        self.caches = [cache for cache in caches if not cache.is_state]
        self.states = [cache for cache in caches if cache.is_state]
        self.values: dict[str, Any] = {}  # by the name of the input
        self.capacities = [0] * record.layers
        self.step: Any = None  # a decode step bound to these blocks
        self.closed = False

    def reserve(self, lengths: Ids, filled: Ids) -> None:
        """Hold `filled` tokens in each layer, and not many more; of those that are cached, the
        first `lengths` stay."""
        for state in self.states:
            if state.past.name not in self.values:
                self.values[state.past.name] = self._state_block(state)
        for layer, (held, needed) in enumerate(zip(lengths.tolist(), filled.tolist(), strict=True)):
            capacity, now = needed + -needed % STEP, self.capacities[layer]
            if now < capacity or (now > capacity + STEP and not held):
                self.capacities[layer] = 0  # until keys and values are both as long
                for cache in self.caches:
                    if cache.index == layer:
                        source = self.values.get(cache.past.name)
                        self._fill(cache.past.name, source, held, capacity)
                self.capacities[layer], self.step = capacity, None

    def bind(self, binding: Any, lengths: Ids, filled: Ids) -> None:
        """Bind past and present of a call: `lengths` tokens of each layer become `filled`."""
        self._bind_in_place(binding, [*self.caches, *self.states])

    def copy(self, lengths: Ids) -> OrtCaches:
        """Others, as long, that hold the same `lengths` tokens."""
        twin = type(self)(self.device, self.record, [*self.caches, *self.states])
        twin.capacities = [*self.capacities]
        for cache in self.caches if self.values else ():
            name, layer = cache.past.name, cache.index
            twin._fill(name, self.values[name], int(lengths[layer]), self.capacities[layer])
        for state in self.states if self.values else ():
            name = state.past.name
            twin.values[name] = self._state_block(state)
            whole = 1, 1, 1, state.past.bytes({}) // np.dtype(self.device.element).itemsize
            self.device.copy(self.values[name], whole, twin.values[name], 0)  # bit by bit
        return twin

    def bytes(self) -> int:
        row = self.record.kv_heads * self.record.head_size * np.dtype(self.device.element).itemsize
        caches = sum(self.blocks * self.capacities[cache.index] * row for cache in self.caches)
        return caches + sum(s.past.bytes({}) for s in self.states if s.past.name in self.values)

    def close(self) -> None:
        self.values, self.step, self.closed = {}, None, True

    def _state_block(self, state: CacheRecord) -> Any:
        """Memory for a state, whose numbers may be of a type of their own."""
        element = dtypes.stored_type(state.past.dtype).type
        return self.device.block(state.past.shape({}), element)

    def _fill(self, name: str, source: Any, held: int, capacity: int) -> None:
        """A new block of `capacity` tokens, at its start the first `held` of another."""
        block = self.device.block(self._shape(capacity))
        # A head's tokens are followed by its unused slots, so all slots are copied, or none.
        read = int(source.shape()[2]) if held else 0
        self.device.copy(source or block, self._shape(read), block, capacity - read)
        self.values[name] = block

    def _bind_in_place(self, binding: Any, caches: Sequence[CacheRecord]) -> None:
        for cache in caches:
            block = self.values[cache.past.name]
            binding.bind_ortvalue_input(cache.past.name, block)
            binding.bind_ortvalue_output(cache.present.name, block)

    def _shape(self, tokens: int) -> tuple[int, ...]:
        return 1, self.record.kv_heads, tokens, self.record.head_size


class GrowingCaches(OrtCaches):
    """Past [1, kv_heads, length, head] lies in one block, present in the other; they swap."""

    moving = True
    blocks = 2

    def __init__(
        self, device: Device, record: DecoderRecord, caches: Sequence[CacheRecord]
    ) -> None:
        super().__init__(device, record, caches)
        self.others: dict[str, Any] = {}  # where the next present goes

    def bind(self, binding: Any, lengths: Ids, filled: Ids) -> None:
        device = self.device.name, 0, self.device.element
        self._bind_in_place(binding, self.states)
        for cache in self.caches:
            name, layer = cache.past.name, cache.index
            past, present = self.values[name], self.others[name]
            before, behind = self._shape(int(lengths[layer])), self._shape(int(filled[layer]))
            binding.bind_input(name, *device, before, past.data_ptr())
            binding.bind_output(cache.present.name, *device, behind, present.data_ptr())
            self.values[name], self.others[name] = present, past

    def close(self) -> None:
        super().close()
        self.others = {}

    def _fill(self, name: str, source: Any, held: int, capacity: int) -> None:
        """Two new blocks; what is cached lies without gaps at the start of the first."""
        block = self.device.block(self._shape(capacity))
        if held:
            self.device.copy(source, self._shape(held), block, 0)
        self.values[name], self.others[name] = block, self.device.block(self._shape(capacity))


def make(device: Device, record: DecoderRecord, caches: Sequence[CacheRecord]) -> OrtCaches:
    """The caches of a decoder, as its manifest says that they are kept."""
    kind = GrowingCaches if record.cache == "grow" else OrtCaches
    return kind(device, record, caches)
