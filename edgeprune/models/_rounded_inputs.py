"""What reaches a product whose inputs have 8 bits: the eager counterpart of the graphs' nodes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from edgeprune.models._layers import Linear
from edgeprune.models._quantised import FLOAT8_LARGEST, float8
from edgeprune.models._weight_plan import WeightPlan

Rounding = Callable[[Tensor], Tensor]

LARGEST = 127
TINY = 1e-30
"""A scale at least, so that a token of zeros can be divided by it."""


def by_token(x: Tensor) -> Tensor:
    """Each token [..., K] to 255 values, evenly spaced up to its own largest number."""
    wide = x.float()
    scale = (wide.abs().amax(-1, keepdim=True) * (1 / LARGEST)).clamp(min=TINY)
    return (wide / scale).round().clamp(-LARGEST - 1, LARGEST).mul(scale).to(x.dtype)


def to_int8(x: Tensor, scale: Tensor) -> Tensor:
    """All numbers to multiples of one scale."""
    return (x.float() / scale).round().clamp(-LARGEST - 1, LARGEST).mul(scale).to(x.dtype)


def to_float8(x: Tensor, scale: Tensor) -> Tensor:
    """All numbers to floats of 8 bits times one scale."""
    return float8(x.float() / scale).float().mul(scale).to(x.dtype)


def scale_of(peak: float, dtype: torch.dtype, *, is_float8: bool) -> Tensor:
    """The scale with which codes reach `peak`, rounded to a dtype: float32 []."""
    step = peak / (FLOAT8_LARGEST if is_float8 else LARGEST)
    scale = torch.tensor(step).to(dtype).float()
    return scale if float(scale) > 0 else torch.tensor(1.0)


def round_inputs(weights: WeightPlan, *modules: nn.Module) -> None:
    """Let products round their inputs where a bundle with these weights does."""
    for module in modules:
        for path, part in module.named_modules():
            rounding = _rounding(weights, f"{path}.weight") if isinstance(part, Linear) else None
            if rounding is not None:
                part.register_forward_pre_hook(_before(rounding))


def _rounding(weights: WeightPlan, name: str) -> Rounding | None:
    """How the inputs of a weight's product are rounded; None where they are not."""
    form, peak = weights.forms.get(name), weights.tuning.peaks.get(name)
    if form is None or not form.activations:
        return None
    if peak is None:
        return by_token
    scale = scale_of(peak, weights.scales, is_float8=form.float8)
    return partial(to_float8 if form.float8 else to_int8, scale=scale)


def _before(rounding: Rounding) -> Callable[[nn.Module, tuple[Tensor]], Tensor]:
    return lambda module, inputs: rounding(inputs[0])
