"""Weights in float8 (e4m3) with a scale for each block, as DeepSeek and Qwen publish them, or with
one scale, as Mistral does.

Of a Linear with K inputs and N outputs: `weight` F8_E4M3 [N, K] and `weight_scale_inv`
[N / rows, K / columns], rounded up, for `weight_block_size` [rows, columns]; without one, a single
`weight_scale_inv` or `weight_scale`, and beside it `activation_scale` where `activation_scheme` is
static: what its inputs are rounded with in float8, which floats are not. The weight is the product
of weight and scale: despite its name no scale is inverted (transformers,
integrations/finegrained_fp8.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from edgeprune.models._quantised import QuantizedWeight
from edgeprune.models._stored_formats._codes import scaled
from edgeprune.models._stored_formats._format import FLOATS, Parts, Settings, StoredFormat

FLOAT8, POWERS = "F8_E4M3", "F8_E8M0"
INPUTS = "activation_scale", "input_scale"
"""Names of the scale of a product's inputs."""


@dataclass(frozen=True)
class Format(StoredFormat):
    """A scale for each block of rows x columns; None: one for a weight."""

    block: tuple[int, int] | None
    static: bool  # whether inputs of products are rounded with a scale that is stored
    method: ClassVar[str] = "fp8"
    leaves: ClassVar[tuple[str, ...]] = ("weight_scale_inv", "weight_scale")
    spare: ClassVar[tuple[str, ...]] = (*INPUTS, "k_scale", "v_scale")

    @classmethod
    def parse(cls, file: Path, scheme: Mapping[str, Any]) -> Format:
        settings = Settings(file, scheme)
        settings.one_of(("fmt", "format"), ("e4m3", "float8_e4m3fn"), "e4m3")
        settings.one_of(("scale_fmt",), ("float", "ue8m0"), "float")
        # GPTQModel's scales divide: its file has these settings, and the same names of tensors.
        settings.refuse("weight_scale_semantics", "weight_scale_method")
        kind = settings.one_of(("activation_scheme",), ("dynamic", "static"), "dynamic")
        return cls(settings.block("weight_block_size"), kind == "static")

    def shape(self, parts: Parts) -> tuple[int, int]:
        leaf = self._scale(parts)
        parts.need("weight", leaf)
        outputs, inputs = parts.matrix("weight", FLOAT8)
        rows, columns = self.block or (outputs, inputs)
        grid = -(-outputs // rows), -(-inputs // columns)
        single = () if self.block else ((), (1,))
        parts.expect(leaf, (*FLOATS, POWERS), grid, *single)
        return outputs, inputs

    def read(self, parts: Parts) -> QuantizedWeight | Tensor:
        scales = parts.scales(self._scale(parts))
        if self.block is None:
            return parts.float8(scales.reshape(1, 1))
        weight, (rows, columns) = parts.read("weight"), self.block
        grid = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
        return scaled(weight, scales.reshape(grid), rows, columns)

    def input_scale(self, parts: Parts) -> float | None:
        return parts.number(*INPUTS) if self.static else None

    def _scale(self, parts: Parts) -> str:
        """Scales of blocks have but one of the two names."""
        plain = self.block is None and parts.has("weight_scale")
        return "weight_scale" if plain else "weight_scale_inv"

    def __str__(self) -> str:
        rows, columns = self.block or (0, 0)
        each = f"blocks of {rows} x {columns}" if self.block else "one scale a weight"
        return f"float8, {each}"
