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


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[batch, S, heads * head] -> [batch, heads, S, head]."""
    batch, length, width = x.shape
    return x.view(batch, length, heads, width // heads).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[batch, heads, S, head] -> [batch, S, heads * head]."""
    return x.transpose(1, 2).flatten(2)
