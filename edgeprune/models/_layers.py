"""The layers that every model shares, and which of them may stay in float32 in half precision."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune.models._ops import Causal, TorchOps, cast, scalar

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(scalar(1.702, x) * x),
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
"""By the names that transformers has for them."""


class Part(nn.Module):
    """A part of a model that may compute in float32 where the rest is in half precision.

    Its result is float32 then. Whatever reads it casts it, unless it is such a part itself or adds
    it to others: a sum or product of two dtypes is float32.
    """

    wide = False  # has no effect in a float32 model


class Linear(Part):
    """y = x W + b with W stored [in, out], as MatMul reads it: no transpose is left in a graph.

    Where a quantised weight has offsets, W is its codes times scales, and each offset times the sum
    of its block of x is added: two products, as graphs compute them (export/products.py).
    """

    offsets: Tensor | None = None  # [blocks of inputs, out]; loaded with the weight

    def __init__(self, inputs: int, outputs: int, ops: TorchOps, bias: bool = False) -> None:
        super().__init__()
        self.ops = ops
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return torch.float32 if self.wide else self.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.dtype
        bias = None if self.bias is None else cast(self.bias, dtype)
        x = cast(x, dtype)
        product = self.ops.linear(x, cast(self.weight, dtype), bias)
        if self.offsets is None:
            return product
        sums = x.reshape(*x.shape[:-1], len(self.offsets), -1).sum(-1)
        return product + self.ops.linear(sums, cast(self.offsets, dtype))


class Narrow(Linear):
    """A Linear that is never `wide`: what reads it has a fixed dtype, as a cache has."""


class Unquantised(Narrow):
    """A Narrow of a few outputs that decide much: its weight is never quantised."""


class Sum(Part):
    """A residual connection: from a float32 branch on, the residual stream is float32."""

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        x, branch = common(self.wide, x, branch)
        return x + branch


class Product(Part):
    """Element by element: gate * up."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = common(self.wide, a, b)
        return a * b


def parts(name: str, module: nn.Module) -> dict[str, Part]:
    """The parts of a module that may stay in float32, by path below `name`."""
    found = module.named_modules(prefix=name)
    return {
        path: part
        for path, part in found
        if isinstance(part, Part) and not isinstance(part, Narrow)
    }


def widen(name: str, module: nn.Module, paths: Collection[str]) -> None:
    """Let those parts compute in float32 whose paths are given, and no others."""
    for path, part in parts(name, module).items():
        part.wide = path in paths


def common(wide: bool, *tensors: Tensor) -> list[Tensor]:
    """Tensors in the one dtype that holds them all, float32 if `wide`."""
    dtype = torch.float32 if wide else tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [cast(tensor, dtype) for tensor in tensors]


class Scores(Part):
    """Attention; its scores may stay in float32."""

    def __init__(self, ops: TorchOps, scale: float | None = None, cap: float | None = None) -> None:
        super().__init__()
        self.ops, self.scale, self.cap = ops, scale, cap

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Causal | Tensor | None = None
    ) -> Tensor:
        if self.cap is not None:
            if self.wide:
                query, key = query.float(), key.float()
            return self.ops.attend_capped(query, key, value, mask, self.scale, self.cap)
        attend = self.ops.attend_wide if self.wide else self.ops.attend
        return attend(query, key, value, mask, self.scale)


class WithBuffers(nn.Module):
    """A module whose buffers are computed, not stored: [] until `compute_buffers` fills them."""

    def compute_buffers(self, dtype: torch.dtype) -> None:
        raise NotImplementedError


def compute_buffers(module: nn.Module, dtype: torch.dtype) -> None:
    """Fill the tables of a module and of all in it; a module built on the meta device has none."""
    for part in module.modules():
        if isinstance(part, WithBuffers):
            part.compute_buffers(dtype)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[batch, S, heads * head] -> [batch, heads, S, head]."""
    batch, _, width = x.shape
    return x.view(batch, -1, heads, width // heads).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[batch, heads, S, head] -> [batch, S, heads * head]."""
    batch, heads, _, size = x.shape
    return x.transpose(1, 2).contiguous().view(batch, -1, heads * size)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis."""

    def __init__(self, width: int, eps: float, ops: TorchOps) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps, self.ops = eps, ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """(x - mean(x)) / deviation(x) * weight + bias over the last axis."""

    def __init__(self, width: int, eps: float, ops: TorchOps) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.empty(width)) for _ in range(2))
        self.eps, self.ops = eps, ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.layer_norm(x, self.weight, self.bias, self.eps)


class Gain(Part):
    """A learned factor for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        x, weight = common(self.wide, x, self.weight)
        return x * weight
