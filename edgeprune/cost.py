"""What a plan saves, by counting: operations of a prefill or decode step, bytes of KV cache.

One multiply-add is two operations. A layer with n tokens costs 2n(2 D H d + 2 D G d + 3 D M) for
its projections and MLP and 4 n^2 H d for attention (width D, heads H of size d, KV heads G, MLP
width M), and an output gate 2n D H d more. A layer with a short convolution has 2n(4 D^2 + 3 D M).
One with linear attention has 2n(D (C + 2 I + 2 N) + 3 I k + 3 D M): C channels of queries, keys and
values, I of the N value heads, k of a key head. Scoring and gathering are not counted: the share of
this limit that a measurement reaches shows what they cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from edgeprune.spec import LinearAttention

ATTENTION = "attention"


class Sizes(Protocol):
    """The fields of a decoder that counting needs; ModelShape and DecoderRecord both have them."""

    @property
    def width(self) -> int: ...
    @property
    def mlp_width(self) -> int: ...
    @property
    def attention_heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_size(self) -> int: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def convolutions(self) -> tuple[int, ...]: ...
    @property
    def kernel(self) -> int: ...
    @property
    def linear(self) -> LinearAttention | None: ...
    @property
    def output_gate(self) -> bool: ...


def prefill_operations(sizes: Sizes, counts: Sequence[int], text: int) -> int:
    """Operations of a prefill: `text` text tokens, counts[l] visual ones in layer l + 1."""
    tokens = (count + text for count in counts)
    layers = sum(_layer(sizes, layer, n, n) for layer, n in enumerate(tokens, 1))
    return layers + 2 * sizes.width * sizes.vocabulary


def decode_operations(sizes: Sizes, counts: Sequence[int], text: int) -> int:
    """Operations of one decode step with `text` text tokens already in every layer's cache."""
    tokens = (count + text + 1 for count in counts)
    layers = sum(_layer(sizes, layer, 1, n) for layer, n in enumerate(tokens, 1))
    return layers + 2 * sizes.width * sizes.vocabulary


def kv_bytes(sizes: Sizes, counts: Sequence[int], text: int, element: int) -> int:
    """Bytes of the KV caches and states for `text` text tokens and elements of `element` bytes."""
    return sum(layer_bytes(sizes, text, element, counts))


def layer_bytes(sizes: Sizes, text: int, element: int, counts: Sequence[int]) -> list[int]:
    """The same of each layer."""
    state = _state_bytes(sizes, element)
    row = 2 * sizes.kv_heads * sizes.head_size * element
    return [
        state if layer in sizes.convolutions else row * (count + text)
        for layer, count in enumerate(counts, 1)
    ]


def _state_bytes(sizes: Sizes, element: int) -> int:
    """Of what a layer without attention keeps: matrices are float32 whatever the elements are."""
    if (linear := sizes.linear) is None:
        return (sizes.kernel - 1) * sizes.width * element
    return (sizes.kernel - 1) * linear.channels * element + 4 * linear.numbers


def layer_kind(sizes: Sizes, layer: int) -> str:
    """What a layer (1-based) has in place of attention, or that: one kind takes equally long."""
    if layer not in sizes.convolutions:
        return ATTENTION
    return "convolution" if sizes.linear is None else "linear attention"


def layer_operations(sizes: Sizes, layer: int, count: int, text: int) -> int:
    """Operations of one layer (1-based) in a prefill of `count` visual and `text` text tokens."""
    return _layer(sizes, layer, count + text, count + text)


def block_operations(
    width: int, mlp_width: int, windows: Sequence[tuple[int, int]], products: int = 2
) -> int:
    """Operations of an encoder block whose tokens attend within `windows`, each run of them given
    as their number and the tokens of each; `products` of its MLP."""
    tokens = sum(number * size for number, size in windows)
    pairs = sum(number * size * size for number, size in windows)
    return 2 * tokens * width * (4 * width + products * mlp_width) + 4 * pairs * width


def _layer(sizes: Sizes, layer: int, new: int, seen: int) -> int:
    if layer in sizes.convolutions:
        mlp = 3 * sizes.width * sizes.mlp_width
        if (linear := sizes.linear) is None:
            return 2 * new * (4 * sizes.width**2 + mlp)
        projections = sizes.width * (linear.channels + 2 * linear.inner + 2 * linear.value_heads)
        return 2 * new * (projections + 3 * linear.numbers + mlp)
    attention = sizes.attention_heads * sizes.head_size
    projections = 2 * sizes.width * (attention + sizes.kv_heads * sizes.head_size)
    projections += sizes.output_gate * sizes.width * attention
    mlp = 3 * sizes.width * sizes.mlp_width
    return 2 * new * (projections + mlp) + 4 * new * seen * attention
