"""Which weights of a model are quantised, and how: decided once, for graphs and eager reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from edgeprune.models._decoder import Decoder
from edgeprune.models._layers import Linear, Unquantised
from edgeprune.models._tuning import UNTUNED, Tuning
from edgeprune.weight_format import Form, WeightFormat

HEAD, EMBEDDING = "head.weight", "embedding.weight"


@dataclass(frozen=True)
class WeightPlan:
    """The forms of the quantised weights, by parameter; all others are floats."""

    forms: Mapping[str, Form]
    sizes: Mapping[str, tuple[int, int]]  # inputs and outputs of these
    scales: torch.dtype  # in which graphs store them
    clip: bool = False  # whether scales of 4 bits are searched for
    zero_points: bool = False  # whether graphs take these; else offsets of blocks stand for them
    largest: int | None = None  # code of a product whose inputs are codes too; None: what bits hold
    tuning: Tuning = UNTUNED  # what samples say of them

    @property
    def head_apart(self) -> bool:
        """Whether the output head or the embedding is quantised, so that they are no longer one
        tensor."""
        return bool(self.forms.keys() & {HEAD, EMBEDDING})


def plan_weights(
    wanted: WeightFormat,
    vision: nn.Module,
    decoder: Decoder,
    scales: torch.dtype,
    tuning: Tuning = UNTUNED,
    *,
    zero_points: bool = False,
    largest: int | None = None,
) -> WeightPlan:
    """The forms that a format has for a model; modules may be on the meta device."""
    forms, sizes = dict[str, Form](), dict[str, tuple[int, int]]()
    for part, name, size in _weights(vision, decoder):
        if (form := wanted.form(part, *size, tuning.kinds.get(name, ""))) is not None:
            forms[name], sizes[name] = form, size
    return WeightPlan(forms, sizes, scales, wanted.clip, zero_points, largest, tuning)


def _weights(vision: nn.Module, decoder: Decoder) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """Every product with a weight: its part of the model, its parameter, inputs and outputs. Of the
    embedding a row is an output."""
    for part, module in (("vision", vision), ("kind", decoder)):
        for path, one in module.named_modules():
            if isinstance(one, Linear) and not isinstance(one, Unquantised):
                inputs, outputs = one.weight.shape
                yield part, f"{path}.weight", (inputs, outputs)
    rows, width = decoder.embedding.weight.shape
    yield "head", HEAD, (width, decoder.config.vocabulary)
    yield "embedding", EMBEDDING, (width, rows)
