"""Graph dialects: which operators the few lowered operations become.

`modern` (opset 24): RMSNormalization, RotaryEmbedding, TensorScatter for the in-place cache and
Attention with `is_causal` and `nonpad_kv_seqlen`; for ONNX Runtime and for TensorRT-RTX.
`jetpack7` (opset 24): as `modern`, but Attention is given a boolean mask, since TensorRT 10.15 and
10.16 take neither `nonpad_kv_seqlen` nor a causal mask that is aligned to the bottom right.
`jetpack6` (opset 18): operators that TensorRT 10.3 has. Its caches grow by Concat.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edgeprune.export.delta_rule import emit_rule
from edgeprune.lowering import Lowering
from edgeprune.models._ops import Causal, TorchOps, attention, cast


class GraphOps(TorchOps):
    """What every dialect writes out in plain operators."""

    def delta_rule(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        decay: Tensor,
        beta: Tensor,
        state: Tensor,
    ) -> tuple[Tensor, Tensor]:
        return emit_rule(query, key, value, decay, beta, state)

    def scatter(self, known: Tensor, indices: Tensor, new: Tensor) -> Tensor:
        inputs = known, indices, new
        return torch.onnx.ops.symbolic(
            "ScatterND", inputs, dtype=known.dtype, shape=known.shape, version=18
        )


class ModernOps(GraphOps):
    """Opset-24 operators; only for tracing, their results are empty."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inputs: list[Tensor | None] = [x, cast(weight, x.dtype)]
        normed = _emit("RMSNormalization", inputs, x, epsilon=eps, stash_type=1)
        return cast(normed, weight.dtype)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
        return _emit("RotaryEmbedding", [x, cos, sin, positions], x)

    def write(self, past: Tensor, new: Tensor, start: Tensor) -> Tensor:
        return _emit("TensorScatter", [past, new, start], past, axis=2, mode="linear")

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Causal | Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        scaled = {} if scale is None else {"scale": scale}
        inputs: list[Tensor | None] = [query, key, value]
        if isinstance(mask, Causal) and mask.is_plain:
            inputs += [None, None, None, mask.end]
            return _emit("Attention", inputs, query, is_causal=1, **scaled)
        if mask is not None:
            inputs.append(_written(mask, query, key))
        return _emit("Attention", inputs, query, **scaled)


class Jetpack7Ops(ModernOps):
    """As ModernOps, but what a token may see is always written out."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Causal | Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        written = None if mask is None else _written(mask, query, key)
        return super().attend(query, key, value, written, scale)


def _written(mask: Causal | Tensor, query: Tensor, key: Tensor) -> Tensor:
    """An input of Attention: what a token may see, bool [1, 1, S, capacity], or a bias."""
    return mask.seen(query, key)[None, None] if isinstance(mask, Causal) else mask


class Jetpack6Ops(GraphOps):
    """Products, sums and softmax; a cache is [1, kv_heads, length, head] and gets longer."""

    def write(self, past: Tensor, new: Tensor, start: Tensor) -> Tensor:
        return torch.cat([past, new], dim=2)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Causal | Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        return attention(query, key, value, mask, scale)


def _emit(
    operator: str,
    inputs: list[Tensor | None],
    like: Tensor,
    **attributes: int | float | str,
) -> Tensor:
    """One ONNX node whose output has the shape and dtype of `like`."""
    return torch.onnx.ops.symbolic(
        operator,
        inputs,
        dict(attributes),
        dtype=like.dtype,
        shape=like.shape,
        version=24,
    )


@dataclass(frozen=True, slots=True)
class Dialect:
    """A set of lowerings, its opset, and whether the cache is written in place or grows.

    With `token` the graph says which token is the likeliest; a CPU has the logits at hand. `codes`
    is the operator that reads quantised weights of products, `rows` that reads an embedding's,
    `integers` that of products whose inputs are codes too. `fused`: ONNX Runtime's own operators
    stand for several of the decoder's (fused.py).
    """

    name: str
    opset: int
    ops: type[TorchOps]
    cache: str
    token: bool = True
    codes: str = "DequantizeLinear"
    rows: str = "Div"
    integers: str = ""
    fused: bool = False


MODERN = Dialect("modern", 24, ModernOps, "in-place")
JETPACK7 = Dialect("jetpack7", 24, Jetpack7Ops, "in-place")
JETPACK6 = Dialect("jetpack6", 18, Jetpack6Ops, "grow")

DIALECTS = {dialect.name: dialect for dialect in (MODERN, JETPACK7, JETPACK6)}


QUANTISED = 21
"""The first opset whose DequantizeLinear takes 4 bits, blocks, and scales in half precision."""


def dialect_of(lowering: Lowering) -> Dialect:
    """The dialect of a target; quantised weights need a later opset than jetpack6 has else."""
    target, found = lowering.target, DIALECTS[lowering.target.dialect]
    opset = found.opset if lowering.weights.is_float else max(found.opset, QUANTISED)
    return replace(
        found,
        opset=opset,
        token=target.token,
        codes=target.codes,
        rows=target.rows,
        integers=target.integers,
        fused=target.fused and lowering.dtype.name == "fp32",
    )
