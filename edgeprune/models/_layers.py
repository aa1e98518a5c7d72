"""Parameters of the layers that every model shares."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Linear(nn.Module):
    """y = x W + b with W stored [in, out], as MatMul reads it: no transpose is left in a graph."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = x @ self.weight
        return product if self.bias is None else product + self.bias


class Scale(nn.Module):
    """The weight of a norm; the dialect's operator applies it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))


class Tabled(nn.Module):
    """A module with buffers that are computed, not stored: [] until `set_tables` fills them."""

    def set_tables(self, dtype: torch.dtype) -> None:
        raise NotImplementedError


def set_tables(module: nn.Module, dtype: torch.dtype) -> None:
    """Fill the tables of a module and of all in it; a module built on the meta device has none."""
    for part in module.modules():
        if isinstance(part, Tabled):
            part.set_tables(dtype)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[batch, S, heads * head] -> [batch, heads, S, head]."""
    batch, length, width = x.shape
    return x.view(batch, length, heads, width // heads).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[batch, heads, S, head] -> [batch, S, heads * head]."""
    return x.transpose(1, 2).flatten(2)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in float32, from plain operators."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(x.dtype)


class HeadNorm(RMSNorm):
    """The same over each head's part of the last axis, with one weight for all heads."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        size = self.weight.shape[0]
        return super().forward(x.view(batch, length, width // size, size)).flatten(2)


class Gain(nn.Module):
    """A learned factor for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight
