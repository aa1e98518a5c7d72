"""What calibration samples say of weights before they are quantised, by parameter.

A fold moves scales from one tensor into another, so that the model computes the same: what makes
the inputs of a product is divided by them, the product's weight is multiplied (AWQ,
arXiv:2306.00978). The larger a channel's scale, the finer its weight is quantised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from edgeprune.models._quantised import QuantizedWeight


@dataclass(frozen=True)
class Fold:
    """What a parameter is multiplied by, input by input, and divided by, output by output."""

    inputs: Tensor | None = None  # float32 [K], of a weight [K, N]
    outputs: Tensor | None = None  # float32 [N], of a weight [K, N], a norm's weight or a bias [N]

    def applied(self, parameter: Tensor, outputs: slice | None = None) -> Tensor:
        """A parameter, of which some `outputs` may be all that is there."""
        if self.inputs is not None:
            parameter = parameter * self.inputs[:, None]
        if self.outputs is not None:
            parameter = parameter / self.outputs[outputs or slice(None)]
        return parameter


@dataclass(frozen=True)
class Tuning:
    """Folds, how much each input of a product counts where its weight is quantised, the kinds of
    products that were left open, and how large the inputs of products are."""

    folds: Mapping[str, Fold] = field(default_factory=dict)
    importance: Mapping[str, Tensor] = field(default_factory=dict)  # float32 [K], after the folds
    kinds: Mapping[str, str] = field(default_factory=dict)  # float, int8 or int4
    peaks: Mapping[str, float] = field(default_factory=dict)  # the largest |x|, after the folds
    own_peaks: bool = False  # whether these are the checkpoint's, not those of samples
    codes: Mapping[str, QuantizedWeight] = field(default_factory=dict)  # where samples chose them
    left: tuple[str, ...] = ()  # products of 4 bits that are too large for that


UNTUNED = Tuning()
