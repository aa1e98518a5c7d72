"""What the format of a quantised checkpoint answers, and the tensors that one weight is read of."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from edgeprune.errors import ModelError
from edgeprune.models._quantised import QuantizedWeight
from edgeprune.models._stored import TensorFiles

FLOATS = ("F64", "F32", "F16", "BF16")
"""Stored dtypes of weights and scales that are floats."""
NOT_A_NUMBER = 0x7F
"""The bits of float8 (e4m3) but for its sign that are no number."""
FLOAT = "export the float checkpoint that it was made from"
ORDERED = "orders the inputs by their activations, which is not read"
REQUANTISE = f"quantise without that (desc_act=false, actorder=weight), or {FLOAT}"
DOWNLOAD = "the checkpoint is damaged, or of another layout; download it again"


@dataclass(frozen=True)
class Parts:
    """The tensors of one module's weight, by their names below the module.

    `qweight`, `qzeros` and `scales` of AWQ, say. Nothing is read before its size is known to fit.
    """

    module: str
    leaves: frozenset[str]
    tensors: TensorFiles

    def has(self, leaf: str) -> bool:
        return leaf in self.leaves

    def need(self, *leaves: str, optional: tuple[str, ...] = ()) -> None:
        """ModelError unless these tensors are there, and beside them at most the optional ones."""
        if missing := [leaf for leaf in leaves if leaf not in self.leaves]:
            found = ", ".join(sorted(self.leaves))
            raise self.error(missing[0], f"is missing beside {found}")
        if extra := sorted(self.leaves.difference(leaves, optional)):
            raise self.error(extra[0], f"stands beside {leaves[0]}: two weights in one place")

    def shape(self, leaf: str) -> tuple[int, ...]:
        return self.tensors.shape(self._name(leaf))

    def dtype(self, leaf: str) -> str:
        return self.tensors.dtype(self._name(leaf))

    def matrix(self, leaf: str, *dtypes: str) -> tuple[int, int]:
        """The shape of a tensor of two axes; ModelError where it has others, or another dtype."""
        shape = self.shape(leaf)
        if len(shape) != 2 or 0 in shape or self.dtype(leaf) not in dtypes:
            raise self._misfit(leaf, f"a matrix of {_named(dtypes)}")
        return shape[0], shape[1]

    def expect(self, leaf: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> None:
        """ModelError where a tensor has none of these dtypes, or none of these shapes."""
        if self.dtype(leaf) not in dtypes or self.shape(leaf) not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise self._misfit(leaf, f"{_named(dtypes)} {wanted}")

    def groups(self, leaf: str, inputs: int, group: int | None) -> int:
        """How many groups of inputs have scales of their own: the rows of a matrix of scales.

        ModelError where they do not divide the inputs, or are not of the size that config.json
        says: `group` inputs, -1: all, None: any.
        """
        count, _ = self.matrix(leaf, *FLOATS)
        wanted = inputs if group == -1 else group
        if inputs % count or wanted not in (None, inputs // count):
            size = "groups of one size" if wanted is None else f"groups of {wanted}"
            raise self.error(leaf, f"has scales of {count} groups for {inputs} inputs, want {size}")
        return count

    def read(self, leaf: str) -> Tensor:
        return self.tensors.read(self._name(leaf))

    def scales(self, leaf: str) -> Tensor:
        """A tensor of scales in float32; ModelError unless all are finite."""
        scales = self.read(leaf).float()
        if not bool(scales.isfinite().all()):
            raise self.error(leaf, "holds scales that are infinite or not a number")
        return scales

    def float8(self, scales: Tensor) -> QuantizedWeight:
        """The weight of codes `weight` [N, K] in float8 with one scale an output, [N, 1], or one in
        all, [1, 1]; ModelError where a code is not a number."""
        codes = self.read("weight").t().contiguous()
        if bool(((codes.view(torch.uint8) & NOT_A_NUMBER) == NOT_A_NUMBER).any()):
            raise self.error("weight", "holds codes that are not a number")
        return self.quantized(codes, None, scales.expand(codes.shape[1], 1).t().contiguous(), 8)

    def quantized(
        self, codes: Tensor, zeros: Tensor | None, scales: Tensor, bits: int
    ) -> QuantizedWeight:
        """A weight of these codes [K, N], without zero points where all are 0. Where a scale is 0,
        so is the weight: codes that are 0 say the same with any scale."""
        block = len(codes) // len(scales)
        if zeros is not None and not bool(zeros.any()):
            zeros = None
        if bool((empty := scales == 0).any()):
            wide = empty.repeat_interleave(block, 0)
            codes = codes.view(torch.uint8).masked_fill(wide, 0).view(codes.dtype)
            zeros = None if zeros is None else zeros.masked_fill(empty, 0)
            scales = scales.masked_fill(empty, 1)
        return QuantizedWeight(codes, scales, zeros, bits, block)

    def number(self, *leaves: str) -> float | None:
        """The one positive number of the first of these tensors that is stored beside the weight;
        None where none is. ModelError where it is another number, or several."""
        leaf = next((leaf for leaf in leaves if self._name(leaf) in self.tensors.files), None)
        if leaf is None:
            return None
        self.expect(leaf, FLOATS, (), (1,))
        value = float(self.read(leaf).float())
        if not 0 < value < math.inf:
            raise self.error(leaf, f"is {value:g}, want a positive number")
        return value

    def error(self, leaf: str, message: str, advice: str = DOWNLOAD) -> ModelError:
        """A ModelError about one of the tensors, which may be missing."""
        file = self.tensors.files[self._name(leaf if leaf in self.leaves else min(self.leaves))]
        return ModelError(f"{file}: {self._name(leaf)} {message}; {advice}")

    def _misfit(self, leaf: str, wanted: str) -> ModelError:
        found = f"{self.dtype(leaf)} {list(self.shape(leaf))}"
        return self.error(leaf, f"is {found}, want {wanted}")

    def _name(self, leaf: str) -> str:
        return f"{self.module}.{leaf}"


def _named(dtypes: tuple[str, ...]) -> str:
    """Stored dtypes for people."""
    others = [dtype for dtype in dtypes if dtype not in FLOATS]
    return " or ".join([*others, *(["floats"] if len(others) < len(dtypes) else [])])


class StoredFormat(ABC):
    """A form of quantised weights, with the settings that config.json gives it."""

    method: ClassVar[str]
    """Value of `quant_method` in config.json."""

    leaves: ClassVar[tuple[str, ...]]
    """Tensors beside `weight` by which a module is known to be stored in this form."""

    spare: ClassVar[tuple[str, ...]] = ()
    """Tensors about activations or caches, which are computed in floats here."""

    @classmethod
    @abstractmethod
    def parse(cls, file: Path, scheme: Mapping[str, Any]) -> StoredFormat:
        """The format with the settings of config.json; ModelError where one of them is not
        supported."""

    @abstractmethod
    def shape(self, parts: Parts) -> tuple[int, int]:
        """Outputs and inputs of a weight, N and K; ModelError where its tensors do not fit
        together. Reads no tensor whose size is not bounded."""

    def check(self, parts: Parts) -> None:  # noqa: B027  # most forms have nothing to add
        """ModelError where a weight's smaller tensors say that it is none of this form. Called
        once its size is known to be the model's."""

    @abstractmethod
    def read(self, parts: Parts) -> QuantizedWeight | Tensor:
        """A weight in codes [K, N], or where graphs have no such codes in float32 [N, K].
        Called after `shape`."""

    def input_scale(self, parts: Parts) -> float | None:
        """What the inputs of a weight's product are divided by before they are rounded to float8;
        None where that is not known beforehand."""
        return None

    @abstractmethod
    def __str__(self) -> str:
        """The form for people: `AWQ, 4 bits in groups of 128`."""


@dataclass(frozen=True)
class Settings:
    """What a config.json says of a quantisation, read with one-line errors."""

    file: Path
    scheme: Mapping[str, Any]

    def get(self, *names: str) -> Any:
        """The value of the first name that is there; None where none is."""
        return next((self.scheme[n] for n in names if self.scheme.get(n) is not None), None)

    def one_of(self, names: tuple[str, ...], allowed: tuple[Any, ...], default: Any) -> Any:
        """A setting that has to have one of a few values."""
        value = self.get(*names)
        value = default if value is None else value
        plain = value.lower() if isinstance(value, str) else value
        if type(plain) is not type(allowed[0]) or plain not in allowed:
            raise self.error(names[0], value, " or ".join(map(str, allowed)))
        return plain

    def integer(self, names: tuple[str, ...], default: int) -> int:
        """A whole number: a size, or -1."""
        value = self.get(*names)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or (value < 1 and value != -1):
            raise self.error(names[0], value, "a size or -1")
        return value

    def block(self, name: str) -> tuple[int, int] | None:
        """Rows and columns of a block, both from 1 up; None where the setting is not made."""
        value = self.get(name)
        if value is None:
            return None
        sizes = value if isinstance(value, (list, tuple)) else ()
        if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
            raise self.error(name, value, "rows and columns of a block")
        return sizes[0], sizes[1]

    def refuse(self, *names: str) -> None:
        """ModelError where one of these settings is made: each changes what the weights mean."""
        for name in names:
            if self.scheme.get(name):
                raise self.error(name, self.scheme[name], "none")

    def error(self, name: str, value: Any, wanted: str) -> ModelError:
        told = str(value) if len(str(value)) < 60 else f"{str(value)[:60]}..."
        return ModelError(
            f"{self.file}: the quantisation says {name} {told}, read is {wanted}; {FLOAT}"
        )
