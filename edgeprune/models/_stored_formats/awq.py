"""AWQ in its `gemm` layout, as AutoAWQ and GPTQModel write it (Lin et al. 2023, arXiv 2306.00978).

Of a Linear with K inputs and N outputs in groups of g inputs: `qweight` int32 [K, N / 8], `qzeros`
int32 [K / g, N / 8], `scales` [K / g, N]. Column 8 j + i stands in the nibble ORDER[i] of word j
(AutoAWQ, awq/utils/packing_utils.py). The weight is (q - z) * scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from edgeprune.models._quantised import QuantizedWeight
from edgeprune.models._stored_formats._codes import signed, unpacked
from edgeprune.models._stored_formats._format import FLOATS, Parts, Settings, StoredFormat

ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
BITS = 4


@dataclass(frozen=True)
class Format(StoredFormat):
    """`group` inputs share a scale; -1: all of an output do."""

    group: int
    method: ClassVar[str] = "awq"
    leaves: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")

    @classmethod
    def parse(cls, file: Path, scheme: Mapping[str, Any]) -> Format:
        settings = Settings(file, scheme)
        settings.one_of(("bits", "w_bit"), (BITS,), BITS)
        settings.one_of(("version", "format"), ("gemm",), "gemm")
        settings.one_of(("backend",), ("auto", "autoawq"), "auto")
        return cls(settings.integer(("group_size", "q_group_size"), 128))

    def shape(self, parts: Parts) -> tuple[int, int]:
        parts.need(*self.leaves)
        inputs, words = parts.matrix("qweight", "I32")
        outputs = words * 32 // BITS
        groups = parts.groups("scales", inputs, self.group)
        parts.expect("scales", FLOATS, (groups, outputs))
        parts.expect("qzeros", ("I32",), (groups, words))
        return outputs, inputs

    def read(self, parts: Parts) -> QuantizedWeight:
        codes, zeros = (_columns(parts.read(leaf)) for leaf in ("qweight", "qzeros"))
        return parts.quantized(codes, zeros, parts.scales("scales"), BITS)

    def __str__(self) -> str:
        return f"AWQ, {BITS} bits in groups of {self.group}"


def _columns(words: Tensor) -> Tensor:
    """int32 [rows, N / 8] -> int8 [rows, N], from -8 to 7."""
    return signed(unpacked(words, BITS)[..., ORDER].reshape(len(words), -1), BITS)
