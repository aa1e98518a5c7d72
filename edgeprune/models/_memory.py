"""Whether a checkpoint's weights, loaded for eager work, fit in this machine's memory."""

from __future__ import annotations

from edgeprune.errors import ModelError
from edgeprune.memory import available_bytes
from edgeprune.models._adapter import Adapter

OVERHEAD = 1.3
"""Activations, the process itself and the tensor being read, as a factor on the weights."""


def needed_bytes(adapter: Adapter, element: int = 4) -> int:
    """Bytes that the weights take with elements of `element` bytes, overhead included."""
    return int(OVERHEAD * adapter.checkpoint.num_parameters() * element)


def fits(adapter: Adapter, element: int = 4) -> bool:
    """True where memory suffices, or where the machine does not say."""
    available = available_bytes()
    return available is None or needed_bytes(adapter, element) <= available


def check_memory(adapter: Adapter, work: str, otherwise: str) -> None:
    """ModelError, before anything slow, where eager float32 weights would not fit."""
    if not fits(adapter):
        need, have = needed_bytes(adapter) / 1e9, (available_bytes() or 0) / 1e9
        raise ModelError(
            f"{work} needs {need:.1f} GB of memory, {have:.1f} GB is free; {otherwise}"
        )
