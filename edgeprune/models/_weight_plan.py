"""Which weights of a model are quantised, and how: decided once, for graphs and eager reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from edgeprune.models._decoder import Decoder
from edgeprune.models._layers import Linear
from edgeprune.weight_format import Form, WeightFormat

HEAD = "head.weight"


@dataclass(frozen=True)
class WeightPlan:
    """The forms of the quantised weights, by parameter; all others are floats."""

    forms: Mapping[str, Form]
    scales: torch.dtype  # in which graphs store them

    @property
    def head_apart(self) -> bool:
        """Whether the output head is quantised, so that it is no longer the embedding's tensor."""
        return HEAD in self.forms


def plan_weights(
    wanted: WeightFormat, vision: nn.Module, decoder: Decoder, scales: torch.dtype
) -> WeightPlan:
    """The forms that a format has for a model; modules may be on the meta device."""
    found = {
        name: wanted.form(part, inputs, outputs)
        for part, module in (("vision", vision), ("kind", decoder))
        for name, inputs, outputs in _products(module)
    }
    vocabulary, width = decoder.embedding.weight.shape
    found[HEAD] = wanted.form("head", width, vocabulary)
    return WeightPlan({name: form for name, form in found.items() if form}, scales)


def _products(module: nn.Module) -> Iterator[tuple[str, int, int]]:
    """Every product with a weight: its parameter, inputs and outputs."""
    for path, part in module.named_modules():
        if isinstance(part, Linear):
            yield f"{path}.weight", *part.weight.shape
