"""Where a parameter is stored in a checkpoint: its tensors, and what is done with them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edgeprune.errors import ModelError
from edgeprune.models._checkpoint import Checkpoint
from edgeprune.models._format import check_stored, why_missing
from edgeprune.models._names import Stored
from edgeprune.models._quantised import QuantizedWeight
from edgeprune.models._tuning import Fold
from edgeprune.models._weight_plan import WeightPlan
from edgeprune.weight_format import Form


@dataclass(frozen=True, slots=True)
class Source:
    """Where a parameter comes from in one checkpoint."""

    names: tuple[str, ...]  # the tensors, one below the other
    changes: tuple[str, ...]  # of each, the LoRA adapter's name of it; "" where there is no change
    shape: tuple[int, ...]  # of them together, but for axes of length 1
    transposed: bool  # whether the module wants it the other way
    stored: Stored
    form: Form | None = None  # in which bundles hold it, where it is quantised
    fold: Fold | None = None  # what it is scaled by before that
    importance: Tensor | None = None  # float32 [inputs], how much the error of each counts
    peak: float | None = None  # the largest input of its product, where samples say so
    codes: QuantizedWeight | None = None  # where samples chose them
    stored_shape: tuple[int, ...] = ()  # where it differs from `shape`: what is behind it is 0

    def planned(self, parameter: str, plan: WeightPlan) -> Source:
        """The same with the form that a plan gives it, and with what samples say of it."""
        tuning = plan.tuning
        return replace(
            self,
            form=plan.forms.get(parameter),
            fold=tuning.folds.get(parameter),
            importance=tuning.importance.get(parameter),
            peak=tuning.peaks.get(parameter),
            codes=tuning.codes.get(parameter),
        )


def find_source(
    checkpoint: Checkpoint,
    stored: Stored,
    shape: tuple[int, ...],
    stored_shape: tuple[int, ...],
    *,
    transposed: bool,
) -> Source:
    """Where a parameter of `shape` is, which the checkpoint has as `stored_shape`; ModelError where
    no tensor of it has that shape."""
    names = tuple(_found(checkpoint, part) for part in stored.parts)
    for tensor in names:
        leaves = checkpoint.leaves[tensor.rpartition(".")[0]]
        check_stored(checkpoint.files[tensor], tensor, checkpoint.dtype(tensor), leaves)
    found = _stacked([checkpoint.shape(tensor) for tensor in names], len(stored.rows))
    if found is None or not _same_elements(found, stored_shape):
        shapes = " and ".join(f"{tensor} is {[*checkpoint.shape(tensor)]}" for tensor in names)
        raise ModelError(
            f"{checkpoint.files[names[0]].name}: {shapes},"
            f" config.json says {list(stored_shape)}; the two are not of one checkpoint"
        )
    lora = checkpoint.lora
    changes = tuple(lora.changed_name(part) if lora else "" for part in stored.parts)
    padded = stored_shape if stored_shape != shape else ()
    return Source(names, changes, shape, transposed, stored, stored_shape=padded)


def _found(checkpoint: Checkpoint, names: tuple[str, ...]) -> str:
    """Under which of its names a tensor is stored; where under several, they must be equal."""
    files, folder = checkpoint.files, checkpoint.folder
    found = [name for name in names if name in files]
    if not found:
        raise ModelError(f"{folder} has no tensor {names[0]}; {why_missing(names, files)}")
    for other in found[1:]:
        if not torch.equal(checkpoint.read(found[0]), checkpoint.read(other)):
            raise ModelError(
                f"{folder} stores one weight twice, as {found[0]} and as {other}, and the two"
                " differ; remove the one that is not meant"
            )
    return found[0]


def _stacked(shapes: list[tuple[int, ...]], rows: int) -> tuple[int, ...] | None:
    """The shape of tensors one below the other, or of some rows of one; None where they differ."""
    first = shapes[0]
    if not first:
        return first
    rest = first[1:]
    if any(shape[len(shape) - len(rest) :] != rest for shape in shapes):
        return None
    each = (math.prod(shape[: len(shape) - len(rest)]) for shape in shapes)
    return (rows or sum(each), *rest)


def _same_elements(stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether shapes hold the same elements in the same order, as far as they can tell: axes of
    length 1 aside, and a kernel over frames taken for one over as many more channels."""
    if len(stored) == 5:
        stored = stored[0], stored[1] * stored[2], *stored[3:]
    bare = ([size for size in shape if size != 1] for shape in (stored, wanted))
    return next(bare) == next(bare)
