"""GPTQ without reordered inputs, as AutoGPTQ and GPTQModel write it (arXiv 2210.17323).

Of a Linear with K inputs and N outputs in groups of g inputs, for 4 bits: `qweight` int32
[K / 8, N], row 8 j + i in nibble i of row j; `qzeros` int32 [K / g, N / 8], column 8 j + i in
nibble i of word j; `scales` [K / g, N]; `g_idx` int32 [K], the group of each input. For 8 bits a
word holds four. The weight is (q - z) * scale. Version 1 stores z - 1, `gptq_v2` stores z.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from edgeprune.models._quantised import BITS, QuantizedWeight
from edgeprune.models._stored_formats._codes import along_columns, along_rows, signed
from edgeprune.models._stored_formats._format import (
    FLOAT,
    FLOATS,
    ORDERED,
    REQUANTISE,
    Parts,
    Settings,
    StoredFormat,
)

AMBIGUOUS = (
    "holds zero points of 0, which programs store and read in different ways in version 1 of this"
    " format"
)


@dataclass(frozen=True)
class Format(StoredFormat):
    """`less` is what the stored zero points are too small by. `bits` and `group` are those of
    most modules, and of all where it is not `varied`."""

    bits: int
    group: int
    less: int
    varied: bool = False
    method: ClassVar[str] = "gptq"
    leaves: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")

    @classmethod
    def parse(cls, file: Path, scheme: Mapping[str, Any]) -> Format:
        settings = Settings(file, scheme)
        bits = settings.one_of(("bits",), BITS, 4)
        names = "checkpoint_format", "format"
        version = settings.one_of(names, ("gptq", "gptq_v2"), "gptq")
        settings.one_of(("pack_dtype",), ("int32",), "int32")
        settings.refuse("is_marlin_format", "rotation", "adapter")
        if scheme.get("desc_act") and not scheme.get("static_groups"):
            raise settings.error("desc_act", True, "false: the order of inputs is kept")
        group = settings.integer(("group_size",), 128)
        return cls(bits, group, int(version == "gptq"), bool(scheme.get("dynamic")))

    def shape(self, parts: Parts) -> tuple[int, int]:
        parts.need(*self.leaves[:3], optional=("g_idx",))
        rows, outputs = parts.matrix("qweight", "I32")
        bits = self._bits(parts, outputs)
        inputs = rows * 32 // bits
        groups = parts.groups("scales", inputs, None if self.varied else self.group)
        parts.expect("scales", FLOATS, (groups, outputs))
        parts.expect("qzeros", ("I32",), (groups, outputs * bits // 32))
        if parts.has("g_idx"):
            parts.expect("g_idx", ("I32", "I64"), (inputs,))
        return outputs, inputs

    def check(self, parts: Parts) -> None:
        if parts.has("g_idx"):
            inputs, groups = parts.shape("g_idx")[0], parts.shape("scales")[0]
            if not torch.equal(
                parts.read("g_idx").long(), torch.arange(inputs) // (inputs // groups)
            ):
                raise parts.error("g_idx", ORDERED, REQUANTISE)
        bits = self._bits(parts, parts.shape("qweight")[1])
        if self.less and bool((_zeros(parts, bits) == (1 << bits) - 1).any()):
            raise parts.error("qzeros", AMBIGUOUS, f"write it as gptq_v2, or {FLOAT}")

    def _bits(self, parts: Parts, outputs: int) -> int:
        """The width of a module's codes."""
        if not self.varied:
            return self.bits
        _, words = parts.matrix("qzeros", "I32")
        found = [bits for bits in BITS if bits * outputs == 32 * words]
        if not found:
            raise parts.error(
                "qzeros", f"has {words} words for {outputs} outputs: no codes of 4 or 8 bits"
            )
        return found[0]

    def read(self, parts: Parts) -> QuantizedWeight:
        bits = self._bits(parts, parts.shape("qweight")[1])
        codes = signed(along_columns(parts.read("qweight"), bits), bits)
        zeros = signed(_zeros(parts, bits).add_(self.less), bits)
        return parts.quantized(codes, zeros, parts.scales("scales"), bits)

    def __str__(self) -> str:
        return f"GPTQ, {self.bits} bits in groups of {self.group}"


def _zeros(parts: Parts, bits: int) -> Tensor:
    """The zero points as they are stored: uint8 [K / g, N]."""
    return along_rows(parts.read("qzeros"), bits)
