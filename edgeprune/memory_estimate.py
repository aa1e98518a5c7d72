"""How much memory a model takes where it runs: weights, KV caches, activations; by counting.

Activations are those of a decoder layer in prefill, the largest there are: the residual stream and
what the MLP or the attention holds beside it. The dialect of JetPack 6 writes attention scores out
and has every cache twice, since it grows from one buffer into the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgeprune.cost import Sizes, layer_bytes
from edgeprune.lowering import DTYPES, TARGETS

GB = 10**9
SYSTEM = 5 * GB // 2
"""For the system, CUDA and the engine's own code: an estimate, not measured."""
DEVICES = {"8 GB": 8 * GB, "16 GB": 16 * GB, "32 GB": 32 * GB, "64 GB": 64 * GB}
"""Jetson Orin modules by memory, which CPU and GPU share."""
QUANTISED = ("int4", "int4:vision=on", "int4:vision=on:embedding=on")
"""Formats of weights that a Jetson's engines keep as they are."""
KINDS = tuple(
    (name, dtype, format)
    for name in ("jetpack7", "jetpack6")
    for dtype in TARGETS[name].engines
    for format in ("float", *(QUANTISED if dtype == "fp16" else ()))
)
"""Targets, dtypes and formats of weights of which a Jetson builds engines."""
KEPT = (4,)
"""Bits of codes that TensorRT is known to keep in an engine; those of 8 it may turn into floats."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes, for one target and dtype."""

    target: str
    dtype: str
    format: str  # of the weights, as --weights takes it
    weights: int
    caches: tuple[int, ...]  # of each layer
    activations: int

    @property
    def total(self) -> int:
        return self.weights + sum(self.caches) + self.activations

    def fits(self, device: int) -> bool:
        """Whether a device of so many bytes holds it beside its system."""
        return self.total + SYSTEM <= device


def estimate(
    sizes: Sizes, weights: int, counts: Sequence[int], text: int, kind: tuple[str, str, str]
) -> MemoryEstimate:
    """For `weights` bytes of weights, `text` text tokens and counts[l] visual ones in layer l + 1;
    `kind` is one of KINDS."""
    target, dtype, format = kind
    element, plain = DTYPES[dtype].bytes, TARGETS[target].dialect == "jetpack6"
    copies = 2 if plain else 1
    caches = tuple(copies * kept for kept in layer_bytes(sizes, text, element, counts))
    tokens = max(counts) + text
    attention = (sizes.attention_heads + 2 * sizes.kv_heads) * sizes.head_size * tokens
    scores = sizes.attention_heads * tokens**2 if plain else 0
    beside = max(3 * sizes.mlp_width * tokens, attention + scores)
    activations = element * (2 * sizes.width * tokens + beside)
    return MemoryEstimate(target, dtype, format, weights, caches, activations)
