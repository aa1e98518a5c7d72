"""The quantised weights of a checkpoint, each under the name that it would have as floats."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from edgeprune.errors import ModelError
from edgeprune.models._quantised import QuantizedWeight
from edgeprune.models._stored import TensorFiles
from edgeprune.models._stored_formats._format import Parts, StoredFormat


@dataclass(frozen=True)
class PackedWeight:
    """One weight, and how it is stored."""

    form: StoredFormat
    parts: Parts
    shape: tuple[int, int]  # outputs, inputs

    @classmethod
    def of(cls, form: StoredFormat, parts: Parts) -> PackedWeight:
        """ModelError where the tensors do not fit together."""
        return cls(form, parts, form.shape(parts))

    @property
    def file(self) -> Path:
        """A file that holds a part of it."""
        return self.parts.tensors.files[f"{self.parts.module}.{min(self.parts.leaves)}"]

    def dequantised(self) -> Tensor:
        """The weight as floats: float32 [N, K]."""
        found = self.form.read(self.parts)
        return found if isinstance(found, Tensor) else found.dequantised(torch.float32).t()

    def quantized(self) -> QuantizedWeight | None:
        """The weight as codes [K, N] with scales above 0; None where the form has no such."""
        found = self.form.read(self.parts)
        if isinstance(found, Tensor) or bool((found.scales < 0).any()):
            return None
        return found


@dataclass(frozen=True)
class Packed:
    """All quantised weights by name, and the names of the tensors that belong to them."""

    form: StoredFormat
    weights: dict[str, PackedWeight]
    owned: frozenset[str]
    files: frozenset[Path]  # of these tensors

    @classmethod
    def of(cls, file: Path, form: StoredFormat, files: dict[str, Path]) -> Packed:
        """ModelError where none of the tensors is of the form that config.json tells of."""
        found, spare = _leaves(form, files), _ends(files, form.spare)
        tensors = TensorFiles(files)
        weights, owned = dict[str, PackedWeight](), set(spare)
        for module, leaves in found.items():
            parts = Parts(module, frozenset(leaves), tensors)
            weights[f"{module}.weight"] = PackedWeight.of(form, parts)
            owned.update(f"{module}.{leaf}" for leaf in leaves)
        if not weights:
            raise ModelError(
                f"{file} says that weights are quantised ({form}), and none is stored so; download"
                " the checkpoint again, or remove that entry where the weights are floats"
            )
        return cls(form, weights, frozenset(owned), frozenset(files[name] for name in owned))

    def as_floats(self, files: dict[str, Path]) -> dict[str, Path]:
        """The file of each tensor, of a quantised weight under the name of its floats."""
        found = {name: file for name, file in files.items() if name not in self.owned}
        return found | {name: weight.file for name, weight in self.weights.items()}

    def __str__(self) -> str:
        """What was found, for people."""
        return f"{len(self.weights):,} weights are stored in codes ({self.form})"


def _leaves(form: StoredFormat, files: Iterable[str]) -> dict[str, set[str]]:
    """The leaves of each module that has one by which its form is known, `weight` among them."""
    found: dict[str, set[str]] = {}
    for name in files:
        for leaf in form.leaves:
            if name.endswith(f".{leaf}"):
                found.setdefault(name.removesuffix(f".{leaf}"), set()).add(leaf)
    for module, leaves in found.items():
        if f"{module}.weight" in files:
            leaves.add("weight")
    return found


def _ends(files: Iterable[str], leaves: tuple[str, ...]) -> Iterable[str]:
    """The tensors whose names end in one of some leaves."""
    ends = tuple(f".{leaf}" for leaf in leaves)
    return (name for name in files if ends and name.endswith(ends))
