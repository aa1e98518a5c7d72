"""Operations of torch whose translation by torch's exporter rounds its constants: our own.

A constant is float32 and a Cast rounds it, as `models._ops.scalar` does, so that a float32 copy of
a half-precision graph computes with the number itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset18 as op

GELU = 20
"""The first opset with an operator Gelu."""


def translations(opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """By torch's operation, what builds its nodes at an opset."""
    return {torch.ops.aten.gelu.default: _gelu} if opset < GELU else {}


def _gelu(self: Any, approximate: str = "none") -> Any:
    """x / 2 * (1 + erf(x / sqrt(2))), or 'tanh' in place of erf."""
    if approximate == "tanh":
        cubed = op.Mul(op.Mul(self, self), self)
        inner = op.Add(self, op.Mul(_constant(0.044715, self), cubed))
        bent = op.Tanh(op.Mul(_constant(math.sqrt(2 / math.pi), self), inner))
    else:
        bent = op.Erf(op.Mul(_constant(math.sqrt(0.5), self), self))
    return op.Mul(op.Mul(_constant(0.5, self), self), op.Add(bent, _constant(1.0, self)))


def _constant(value: float, like: Any) -> Any:
    return op.CastLike(op.Constant(value_float=value), like)
