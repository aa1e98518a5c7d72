"""What reaches a product whose inputs have 8 bits: the eager counterpart of the graphs' nodes."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from edgeprune.models._layers import Linear
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


def round_inputs(weights: WeightPlan, *modules: nn.Module) -> None:
    """Let products round their inputs where a bundle with these weights does."""
    for module in modules:
        for path, part in module.named_modules():
            form = weights.forms.get(f"{path}.weight")
            if isinstance(part, Linear) and form is not None and form.activations:
                part.register_forward_pre_hook(_before(by_token))


def _before(rounding: Rounding) -> Callable[[nn.Module, tuple[Tensor]], Tensor]:
    return lambda module, inputs: rounding(inputs[0])
