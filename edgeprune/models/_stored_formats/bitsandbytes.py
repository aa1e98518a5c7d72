"""bitsandbytes with 4 or 8 bits, as transformers stores them (Dettmers et al., arXiv 2305.14314).

Of a Linear with K inputs and N outputs:

- 4 bits: `weight`, the bytes of N K / 2 numbers in reading order, the first in the high nibble;
  `weight.absmax`, a scale for each `blocksize` numbers; `weight.quant_map`, the 16 values that a
  nibble stands for; `weight.quant_state.bitsandbytes__nf4` (or fp4), bytes of JSON. With double
  quantisation `weight.absmax` are codes of `weight.nested_quant_map`, times `weight.nested_absmax`
  for each `nested_blocksize` of them, plus `nested_offset`.
- 8 bits: `weight` int8 [N, K] and `SCB` [N], the largest value of each output: q * SCB / 127.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from edgeprune.models._quantised import QuantizedWeight
from edgeprune.models._stored_formats._codes import scaled
from edgeprune.models._stored_formats._format import (
    FLOATS,
    Parts,
    Settings,
    StoredFormat,
)

_HALF = 0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4
MAPS = {
    "nf4": (
        *(-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004),
        *(0.0, 0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
    ),
    "fp4": (*_HALF, *(-value for value in _HALF)),
}
"""What nibbles stand for, by kind: quantiles of the normal distribution, and 4-bit floats.
bitsandbytes computes with these, whatever map is stored."""
STATE = "weight.quant_state.bitsandbytes__"
NESTED = "weight.nested_absmax", "weight.nested_quant_map"
JSON_BYTES = 4096


@dataclass(frozen=True)
class State:
    """The settings of one weight of 4 bits."""

    shape: tuple[int, int]
    block: int  # numbers that share a scale
    nested_block: int  # scales that share one of their own
    offset: float


@dataclass(frozen=True)
class Format(StoredFormat):
    """A module's tensors say what it is."""

    bits: int
    method: ClassVar[str] = "bitsandbytes"
    leaves: ClassVar[tuple[str, ...]] = (
        *("weight.absmax", "weight.quant_map", *NESTED, STATE + "nf4", STATE + "fp4"),
        *("SCB", "weight_format"),
    )

    @classmethod
    def parse(cls, file: Path, scheme: Mapping[str, Any]) -> Format:
        settings = Settings(file, scheme)
        four = settings.one_of(("load_in_4bit", "_load_in_4bit"), (True, False), False)
        eight = settings.one_of(("load_in_8bit", "_load_in_8bit"), (True, False), False)
        if four == eight:
            raise settings.error("load_in_4bit", four, "one of load_in_4bit and load_in_8bit")
        return cls(4 if four else 8)

    def shape(self, parts: Parts) -> tuple[int, int]:
        return self._shape_of_8(parts) if self.bits == 8 else self._shape_of_4(parts)

    def _shape_of_8(self, parts: Parts) -> tuple[int, int]:
        parts.need("weight", "SCB", optional=("weight_format",))
        outputs, inputs = parts.matrix("weight", "I8")
        parts.expect("SCB", FLOATS, (outputs,))
        if parts.has("weight_format"):
            parts.expect("weight_format", ("U8", "I8", "I32", "I64"), (), (1,))
            if int(parts.read("weight_format").item()) != 0:
                raise parts.error("weight_format", "is not by rows")
        return outputs, inputs

    def _shape_of_4(self, parts: Parts) -> tuple[int, int]:
        state = _state(parts)
        count = state.shape[0] * state.shape[1]
        held = 1
        for length in parts.shape("weight"):
            held *= length
        width = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4}.get(parts.dtype("weight"), 0)
        if held * width != -(-count // 2):
            raise parts.error("weight", f"does not hold {count:,} numbers of 4 bits")
        blocks = -(-count // state.block)
        nested = parts.has(NESTED[0])
        parts.expect("weight.absmax", ("U8",) if nested else FLOATS, (blocks,))
        parts.expect("weight.quant_map", FLOATS, (16,))
        known = torch.tensor(MAPS[_kind(parts)])
        if not torch.allclose(parts.scales("weight.quant_map"), known, rtol=0, atol=1e-5):
            raise parts.error("weight.quant_map", f"is not that of {_kind(parts)}")
        if nested:
            parts.expect(NESTED[0], FLOATS, (-(-blocks // state.nested_block),))
            parts.expect(NESTED[1], FLOATS, (256,))
        return state.shape

    def read(self, parts: Parts) -> QuantizedWeight | Tensor:
        if self.bits == 8:
            scales = parts.scales("SCB") / 127
            return parts.quantized(parts.read("weight").t().contiguous(), None, scales[None], 8)
        state, table = _state(parts), parts.scales("weight.quant_map")
        octets = parts.read("weight").contiguous().view(torch.uint8).flatten()
        numbers = torch.cartesian_prod(table, table)[octets.int()].flatten()  # high nibble first
        count = state.shape[0] * state.shape[1]
        return _blocks(numbers[:count], _scales(parts, state), state.block).view(state.shape)

    def __str__(self) -> str:
        return f"bitsandbytes, {self.bits} bits"


def _kind(parts: Parts) -> str:
    """nf4 or fp4."""
    return next((kind for kind in MAPS if parts.has(STATE + kind)), "nf4")


def _state(parts: Parts) -> State:
    """The settings of a weight, which are stored as bytes of JSON."""
    leaf = STATE + _kind(parts)
    nested = NESTED if parts.has(NESTED[0]) or parts.has(NESTED[1]) else ()
    parts.need("weight", "weight.absmax", "weight.quant_map", leaf, *nested)
    (length,) = parts.shape(leaf) if len(parts.shape(leaf)) == 1 else (0,)
    if parts.dtype(leaf) != "U8" or not 0 < length <= JSON_BYTES:
        raise parts.error(leaf, f"is not {JSON_BYTES:,} bytes of JSON at most")
    try:
        told = json.loads(bytes(parts.read(leaf).tolist()))
        outputs, inputs = map(int, told["shape"])
        state = State(
            (outputs, inputs),
            int(told["blocksize"]),
            int(told["nested_blocksize"]) if nested else 1,
            float(told["nested_offset"]) if nested else 0.0,
        )
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise parts.error(leaf, "cannot be read") from error
    if told.get("quant_type") != _kind(parts) or min(*state.shape, state.block) < 1:
        raise parts.error(leaf, "contradicts itself")
    if state.nested_block < 1:
        raise parts.error(leaf, f"says nested_blocksize {state.nested_block}")
    return state


def _scales(parts: Parts, state: State) -> Tensor:
    """The scale of each block of numbers: float32 [blocks]."""
    if not parts.has(NESTED[0]):
        return parts.scales("weight.absmax")
    codes = parts.read("weight.absmax").int()
    scales = parts.scales(NESTED[1])[codes]
    return _blocks(scales, parts.scales(NESTED[0]), state.nested_block) + state.offset


def _blocks(numbers: Tensor, scales: Tensor, block: int) -> Tensor:
    """Numbers times the scale of their block, of which the last may be shorter: [n]."""
    return scaled(numbers[None], scales[None], 1, block)[0]
