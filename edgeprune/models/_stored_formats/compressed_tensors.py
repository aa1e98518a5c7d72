"""What llm-compressor writes with the library compressed-tensors: integers, packed or not, and
float8.

Of a Linear with K inputs and N outputs:

- pack-quantized: `weight_packed` int32 [N, K * bits / 32], rounded up, input 32 / bits * j + i in
  code i of word j; `weight_shape` [2], N and K; `weight_zero_point` int32 packed likewise along
  the outputs, [N * bits / 32, K / g]. Codes and zero points are stored + 2^(bits - 1).
- int-quantized and float-quantized: `weight` int8 or F8_E4M3 [N, K], and maybe `weight_zero_point`.

Both have `weight_scale`: one, or [N, 1], [N, K / g], or one for each block of rows x columns.
The weight is (q - z) * scale. A module's tensors say which of several groups of settings is its.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from edgeprune.models._quantised import BITS, QuantizedWeight
from edgeprune.models._stored_formats._codes import along_columns, along_rows, scaled, signed
from edgeprune.models._stored_formats._format import (
    FLOATS,
    ORDERED,
    REQUANTISE,
    Parts,
    Settings,
    StoredFormat,
)

PACKED, NAIVE = ("pack-quantized",), ("int-quantized", "float-quantized", "naive-quantized")
STRATEGIES = "tensor", "channel", "group", "block"
DTYPES = {"I8": "int", "F8_E4M3": "float"}


@dataclass(frozen=True)
class Group:
    """Settings of the weights of some modules."""

    bits: int
    kind: str  # int or float
    strategy: str
    symmetric: bool
    rows: int  # of a weight that share a scale; 0: all
    columns: int

    @classmethod
    def parse(cls, file: Path, weights: Mapping[str, Any]) -> Group:
        settings = Settings(file, weights)
        kind = settings.one_of(("type",), ("int", "float"), "int")
        bits = settings.one_of(("num_bits",), BITS if kind == "int" else (8,), 8)
        if (order := weights.get("actorder")) not in (None, False, "weight", "static"):
            raise settings.error("actorder", order, "weight or none")
        settings.one_of(("dynamic",), (False,), False)
        group = settings.integer(("group_size",), -1)
        usual = "tensor" if weights.get("group_size") is None else "channel"
        strategy = settings.one_of(("strategy",), STRATEGIES, "group" if group > 0 else usual)
        rows, columns = {"tensor": (0, 0), "channel": (1, 0)}.get(strategy, (1, max(group, 0)))
        if strategy == "block":
            rows, columns = settings.block("block_structure") or (0, 0)
            settings.one_of(("type",), ("float",), "int")
        symmetric = bool(settings.one_of(("symmetric",), (True, False), True))
        return cls(bits, kind, strategy, symmetric, rows, columns)

    def grid(self, outputs: int, inputs: int) -> tuple[int, int]:
        """The shape of the scales of a weight."""
        rows, columns = self.rows or outputs, self.columns or inputs
        return -(-outputs // rows), -(-inputs // columns)

    def __str__(self) -> str:
        scale = {
            "tensor": "one scale a weight",
            "channel": "one scale an output",
            "group": f"groups of {self.columns}",
            "block": f"blocks of {self.rows} x {self.columns}",
        }[self.strategy]
        return f"{self.bits} bits in {scale}" if self.kind == "int" else f"float8, {scale}"


@dataclass(frozen=True)
class Format(StoredFormat):
    """The groups of settings, of which each module has one."""

    groups: tuple[Group, ...]
    static: bool  # whether inputs of products are rounded to float8 with a scale that is stored
    method: ClassVar[str] = "compressed-tensors"
    leaves: ClassVar[tuple[str, ...]] = (
        *("weight_packed", "weight_scale", "weight_shape", "weight_zero_point"),
        *("weight_g_idx", "weight_global_scale"),
    )
    spare: ClassVar[tuple[str, ...]] = (
        *("input_scale", "input_zero_point", "output_scale", "output_zero_point"),
        *("k_scale", "v_scale", "k_zero_point", "v_zero_point"),
    )

    @classmethod
    def parse(cls, file: Path, scheme: Mapping[str, Any]) -> Format:
        settings, known = Settings(file, scheme), (*PACKED, *NAIVE)
        settings.one_of(("format",), (*known, "mixed-precision"), "none")
        settings.one_of(("quantization_status",), ("compressed", "frozen"), "compressed")
        settings.refuse("transform_config")
        if (sparsity := scheme.get("sparsity_config")) and sparsity != {"format": "dense"}:
            raise settings.error("sparsity_config", sparsity, "none")
        listed = scheme.get("config_groups")
        listed = list(listed.values()) if isinstance(listed, Mapping) else []
        if not listed or not all(isinstance(group, Mapping) for group in listed):
            raise settings.error("config_groups", scheme.get("config_groups"), "settings by group")
        for group in listed:
            Settings(file, group).one_of(("format",), known, known[0])
        found = [group["weights"] for group in listed if isinstance(group.get("weights"), Mapping)]
        if not found:
            raise settings.error("config_groups", listed, "settings of weights")
        static = all(_is_static(group.get("input_activations")) for group in listed)
        return cls(tuple(dict.fromkeys(Group.parse(file, weights) for weights in found)), static)

    def __str__(self) -> str:
        return f"compressed-tensors, {' or '.join(map(str, self.groups))}"

    def shape(self, parts: Parts) -> tuple[int, int]:
        outputs, inputs, _ = self._found(parts)
        return outputs, inputs

    def read(self, parts: Parts) -> QuantizedWeight | Tensor:
        outputs, inputs, group = self._found(parts)
        grid = group.grid(outputs, inputs)
        scales = parts.scales("weight_scale").reshape(grid)
        zeros = _zeros(parts, group.bits, grid)
        if group.kind == "float":
            if zeros is not None and bool(zeros.any()):
                raise parts.error("weight_zero_point", "is not 0 beside floats")
            if grid in ((1, 1), (outputs, 1)):
                return parts.float8(scales)
            rows, columns = group.rows or outputs, group.columns or inputs
            return scaled(parts.read("weight"), scales, rows, columns)
        codes = _codes(parts, group.bits, inputs)
        scales = scales.expand(outputs, -1).t().contiguous()
        zeros = None if zeros is None else zeros.expand(outputs, -1).t().contiguous()
        return parts.quantized(codes.t().contiguous(), zeros, scales, group.bits)

    def input_scale(self, parts: Parts) -> float | None:
        return parts.number("input_scale") if self.static else None

    def _found(self, parts: Parts) -> tuple[int, int, Group]:
        """Outputs, inputs, and the group of settings that a module's tensors are of."""
        if parts.has("weight_g_idx"):
            raise parts.error("weight_g_idx", ORDERED, REQUANTISE)
        packed = parts.has("weight_packed")
        main = "weight_packed" if packed else "weight"
        needed = (main, "weight_scale", *(["weight_shape"] if packed else []))
        parts.need(*needed, optional=("weight_zero_point",))
        if packed:
            outputs, inputs = _stored_shape(parts)
            kind = "int"
        else:
            outputs, inputs = parts.matrix("weight", *DTYPES)
            kind = DTYPES[parts.dtype("weight")]
        for group in self.groups:
            if group.kind == kind and _fits(parts, group, outputs, inputs):
                return outputs, inputs, group
        known = " or ".join(map(str, self.groups))
        found = ", ".join(f"{leaf} {list(parts.shape(leaf))}" for leaf in sorted(parts.leaves))
        raise parts.error(main, f"is of {outputs} x {inputs}: {found} are not {known}")


def _is_static(inputs: Any) -> bool:
    """Whether settings of activations are those of float8 with one scale, known beforehand."""
    if not isinstance(inputs, Mapping) or inputs.get("dynamic"):
        return False
    kind = inputs.get("type"), inputs.get("num_bits"), inputs.get("strategy", "tensor")
    return kind == ("float", 8, "tensor")


def _stored_shape(parts: Parts) -> tuple[int, int]:
    """Outputs and inputs as `weight_shape` says them, of a weight that its words can hold."""
    rows, words = parts.matrix("weight_packed", "I32")
    parts.expect("weight_shape", ("I64", "I32", "I16"), (2,))
    outputs, inputs = map(int, parts.read("weight_shape").tolist())
    if outputs != rows or not 0 < inputs <= words * 32 // min(BITS):
        raise parts.error("weight_shape", f"says {outputs} x {inputs} of {rows} x {words} words")
    return outputs, inputs


def _fits(parts: Parts, group: Group, outputs: int, inputs: int) -> bool:
    """Whether the sizes of a module's tensors are those of a group of settings."""
    grid = group.grid(outputs, inputs)
    shapes = {grid, (1,), ()} if grid == (1, 1) else {grid}
    whole = not group.columns or inputs % group.columns == 0 or group.strategy == "block"
    fits = whole and parts.shape("weight_scale") in shapes
    if parts.has("weight_packed"):
        fits &= parts.shape("weight_packed") == (outputs, -(-inputs * group.bits // 32))
    if not parts.has("weight_zero_point"):
        return fits and group.symmetric and parts.dtype("weight_scale") in FLOATS
    if parts.dtype("weight_zero_point") == "I32":
        shapes = {(-(-outputs * group.bits // 32), grid[1])}
    return fits and parts.shape("weight_zero_point") in shapes


def _codes(parts: Parts, bits: int, inputs: int) -> Tensor:
    """The codes of integers: int8 [N, K]."""
    if parts.has("weight_packed"):
        return signed(along_rows(parts.read("weight_packed"), bits)[:, :inputs], bits)
    return _within(parts, "weight", parts.read("weight"), bits)


def _zeros(parts: Parts, bits: int, grid: tuple[int, int]) -> Tensor | None:
    """The zero points, in the shape of the scales; None where all are 0."""
    if not parts.has("weight_zero_point"):
        return None
    stored = parts.read("weight_zero_point")
    if stored.dtype == torch.int32:
        return signed(along_columns(stored, bits)[: grid[0]], bits)
    if stored.dtype == torch.int8:
        return _within(parts, "weight_zero_point", stored, bits).reshape(grid)
    return stored.float().reshape(grid)


def _within(parts: Parts, leaf: str, codes: Tensor, bits: int) -> Tensor:
    """Codes of int8; ModelError where some are too large for their width."""
    limit = 1 << (bits - 1)
    low, high = map(int, torch.aminmax(codes))
    if low < -limit or high >= limit:
        raise parts.error(leaf, f"holds codes from {low} to {high} for {bits} bits")
    return codes
