"""The weight of a product as codes of few bits, with one scale for each block of inputs.

A weight is [K, N], as MatMul reads it: K inputs, N outputs. A block is some inputs of one output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edgeprune.errors import ExportError

BITS = (4, 8)


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """(codes - zeros) * scales + offsets is the weight. Codes are -8 to 7 for 4 bits, -128 to 127
    for 8, or floats of 8 bits."""

    codes: Tensor  # int8 or float8 [K, N]
    scales: Tensor  # float32 [K / block, N], above 0
    zeros: Tensor | None  # int8 [K / block, N]; None: all are 0
    bits: int
    block: int  # inputs that share a scale; K where an output has one scale
    offsets: Tensor | None = None  # float32 [K / block, N]; None: all are 0

    def __post_init__(self) -> None:
        inputs, outputs = self.codes.shape
        if self.bits not in BITS or self.block < 1 or inputs % self.block:
            raise ExportError(
                f"a quantised weight has 4 or 8 bits and blocks that divide its {inputs} inputs;"
                f" got {self.bits} bits in blocks of {self.block}"
            )
        wanted = (inputs // self.block, outputs)
        for name in ("scales", "zeros", "offsets"):
            tensor: Tensor | None = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != wanted:
                raise ExportError(
                    f"the {name} of a quantised weight [{inputs}, {outputs}] in blocks of"
                    f" {self.block} are {[*wanted]}; got {[*tensor.shape]}"
                )

    @property
    def is_float8(self) -> bool:
        """Whether codes are floats of 8 bits."""
        return self.codes.dtype == torch.float8_e4m3fn

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [K, N], computed in float32 and rounded to a dtype."""
        weight = self.codes.view(-1, self.block, self.codes.shape[1]).float()
        if self.zeros is not None:
            weight -= self.zeros[:, None]
        weight *= self.scales[:, None]
        if self.offsets is not None:
            weight += self.offsets[:, None]
        return weight.view(self.codes.shape).to(dtype)

    @classmethod
    def joined(cls, parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
        """A weight from some of its outputs after others."""
        first = parts[0]

        def together(tensors: Sequence[Tensor | None]) -> Tensor | None:
            found = [tensor for tensor in tensors if tensor is not None]
            return torch.cat(found, 1) if found else None

        codes, scales = (
            torch.cat(t, 1) for t in ([p.codes for p in parts], [p.scales for p in parts])
        )
        zeros = together([part.zeros for part in parts])
        offsets = together([part.offsets for part in parts])
        return replace(first, codes=codes, scales=scales, zeros=zeros, offsets=offsets)

    def part(self, outputs: slice) -> QuantizedWeight:
        """Some outputs of it."""
        codes, scales = self.codes[:, outputs], self.scales[:, outputs]
        zeros, offsets = (
            None if tensor is None else tensor[:, outputs] for tensor in (self.zeros, self.offsets)
        )
        return replace(self, codes=codes, scales=scales, zeros=zeros, offsets=offsets)

    def with_offsets(self, dtype: torch.dtype) -> QuantizedWeight | None:
        """The same without zero points: offsets, rounded to a dtype, in their place; None where
        they do not fit the dtype."""
        if self.zeros is None:
            return self
        offsets = (self.scales * -self.zeros.float()).to(dtype).float()
        if not bool(offsets.isfinite().all()):
            return None
        return replace(self, zeros=None, offsets=offsets)


SHRINKS = tuple(1 - step / 16 for step in range(9))
"""Factors of a scale that `quantize` tries where it may clip. 7/8, where codes reach -8, is one."""


def quantize(
    weight: Tensor,
    bits: int,
    block: int,
    dtype: torch.dtype = torch.float32,
    *,
    clip: bool = False,
    importance: Tensor | None = None,
    largest: int | None = None,
) -> QuantizedWeight:
    """Round a weight [K, N] to the nearest codes; symmetric, the largest of a block is 7 or 127, or
    as given.

    `dtype` is what the graph stores scales in, so they are rounded to it before codes are made. A
    block so small that its scale would be 0 has the scale 1 and codes of 0. `block` divides K.
    With `clip` a block has the one of SHRINKS times this scale that leaves the least sum of
    squared errors, so that few large weights do not make all others coarse; errors count by the
    `importance` [K] of their inputs, if given. ExportError where a scale is beyond the dtype.
    """
    inputs, outputs = weight.shape
    largest = largest or 2 ** (bits - 1) - 1
    blocks = weight.float().view(-1, block, outputs)
    widest = blocks.abs().amax(1) / largest
    counts = 1.0 if importance is None else importance.view(-1, block, 1)
    scales, errors = _usable(widest.to(dtype).float(), weight, dtype), torch.tensor(torch.inf)
    for shrink in SHRINKS if clip else ():
        tried = _usable((widest * shrink).to(dtype).float(), weight, dtype)
        left = _codes(blocks, tried, largest).mul_(tried[:, None]).sub_(blocks).square_()
        error = (left * counts).sum(1)
        scales = torch.where(error < errors, tried, scales)
        errors = torch.minimum(error, errors)
    codes = _codes(blocks, scales, largest).to(torch.int8).view(inputs, outputs)
    return QuantizedWeight(codes, scales, None, bits, block)


def quantize_float8(weight: Tensor, dtype: torch.dtype = torch.float32) -> QuantizedWeight:
    """Round a weight [K, N] to floats of 8 bits (e4m3); the largest of an output is 448.

    Scales are rounded to `dtype` as in `quantize`.
    """
    widest = weight.float().abs().amax(0, keepdim=True) / FLOAT8_LARGEST
    scales = _usable(widest.to(dtype).float(), weight, dtype)
    return QuantizedWeight(float8(weight.float() / scales), scales, None, 8, len(weight))


def float8(x: Tensor) -> Tensor:
    """The nearest floats of 8 bits (e4m3), at most the largest."""
    return x.clamp(-FLOAT8_LARGEST, FLOAT8_LARGEST).to(torch.float8_e4m3fn)


FLOAT8_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def _codes(blocks: Tensor, scales: Tensor, largest: int) -> Tensor:
    """The nearest codes, as floats, of blocks [K / block, block, N] with scales [K / block, N]."""
    return codes_of(blocks, scales[:, None], largest)


def codes_of(weights: Tensor, scales: Tensor, largest: int) -> Tensor:
    """The nearest codes, as floats."""
    return (weights / scales).round_().clamp_(-largest - 1, largest)


def _usable(scales: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as a graph of a dtype may hold them: finite, and 1 in place of 0."""
    if not bool(scales.isfinite().all()):
        raise ExportError(
            f"weights reach {float(weight.abs().max()):.4g}, their scales do not fit"
            f" {str(dtype).removeprefix('torch.')}; export with --dtype bf16 or fp32"
        )
    return scales.masked_fill_(scales == 0, 1)


def fitted(
    stored: QuantizedWeight,
    bits: int,
    block: int,
    dtype: torch.dtype,
    *,
    largest: int | None = None,
) -> QuantizedWeight | None:
    """The same codes in blocks of another size, scales rounded to a dtype; None where bits, blocks
    or the `largest` code do not allow that, or scales do not fit the dtype."""
    if stored.bits != bits:
        return None
    if largest is not None and int(stored.codes.int().abs().max()) > largest:
        return None
    scales = stored.scales.to(dtype).float()
    if stored.block % block or not bool((scales.isfinite() & (scales > 0)).all()):
        return None
    times = stored.block // block
    scales = scales.repeat_interleave(times, 0)
    zeros = None if stored.zeros is None else stored.zeros.repeat_interleave(times, 0)
    return QuantizedWeight(stored.codes, scales, zeros, bits, block)


STRIP = 1 << 23
"""Numbers of a weight that are in float32 at a time, where it can be read by parts."""


def strips(inputs: int, outputs: int) -> Iterator[slice]:
    """Ranges of outputs, an even number in each but the last, of STRIP numbers or so."""
    step = max(2, STRIP // inputs // 2 * 2)
    return (slice(start, min(start + step, outputs)) for start in range(0, outputs, step))


@dataclass(frozen=True, slots=True)
class Strip:
    """Some outputs of a weight, quantised, and what that changed: sums of squares."""

    outputs: slice
    weight: QuantizedWeight  # [K, those outputs]
    error: float  # of the difference from the checkpoint's weight
    power: float  # of that weight
    own: bool  # whether the codes are the checkpoint's own

    @classmethod
    def of(
        cls, outputs: slice, weight: QuantizedWeight, exact: Tensor, *, own: bool = False
    ) -> Strip:
        """With what `exact`, float32 [K, those outputs], loses."""
        error = float((weight.dequantised() - exact).square().sum())
        return cls(outputs, weight, error, float(exact.square().sum()), own)
