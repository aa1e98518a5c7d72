"""The weights of a checkpoint as modules want them: in floats, or in the codes of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from edgeprune.models._checkpoint import Checkpoint
from edgeprune.models._names import Stored
from edgeprune.models._quantised import (
    QuantizedWeight,
    Strip,
    fitted,
    quantize,
    quantize_float8,
    strips,
)
from edgeprune.models._rounding import rounded
from edgeprune.models._weight_plan import WeightPlan
from edgeprune.models._weight_source import Source


@dataclass(frozen=True)
class WeightReader:
    """Reads parameters by their sources, one at a time."""

    checkpoint: Checkpoint
    plan: WeightPlan | None  # of the weights that are quantised; None: none is

    def read(self, source: Source, dtype: torch.dtype) -> Tensor:
        """One parameter, laid out and rounded as a module of ours wants it, where it is quantised
        as its codes say; ModelError where the checkpoint holds a number that is not finite or that
        does not fit the dtype."""
        if source.form is None:
            return self._read(source, dtype)
        found = ((strip.outputs, strip.weight) for strip in self.strips(source))
        return _laid_out(source, dtype, found)

    def terms(self, source: Source, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """What `read` gives but for the offsets of blocks, and these [K / block, N]; None where
        the parameter has none."""
        if source.form is None:
            return self._read(source, dtype), None
        offsets = list[Tensor]()

        def codes() -> Iterator[tuple[slice, QuantizedWeight]]:
            for strip in self.strips(source):
                if strip.weight.offsets is not None:
                    offsets.append(strip.weight.offsets)
                yield strip.outputs, replace(strip.weight, offsets=None)

        whole = _laid_out(source, dtype, codes())
        return whole, torch.cat(offsets, 1).to(dtype) if offsets else None

    def rows(self, source: Source, dtype: torch.dtype) -> Iterator[Tensor]:
        """What `read` gives; of a large one that is stored as it is, an embedding, some rows at a
        time."""
        plain = source.form is None and not source.transposed and self._is_whole(source)
        if not plain or len(source.shape) != 2 or source.fold is not None:
            yield self.read(source, dtype)
            return
        outputs, inputs = source.shape
        for part in strips(inputs, outputs):
            yield self._read(source, dtype, part)

    def _is_whole(self, source: Source) -> bool:
        """Whether one stored tensor is the parameter, in floats, so that its rows may be read."""
        changed = any(source.changes) or source.stored.rows or source.stored_shape
        if len(source.names) > 1 or changed:
            return False
        return self.checkpoint.shape(source.names[0]) == source.shape and not self.is_packed(source)

    def strips(self, source: Source) -> Iterator[Strip]:
        """A quantised weight, some outputs at a time, so that large ones need little memory."""
        assert source.form is not None and self.plan is not None
        outputs, inputs = source.shape
        form, scales = source.form, self.plan.scales
        stored = self.quantized(source)
        if stored is not None and stored.is_float8 and not form.float8:
            stored = None  # its floats are rounded as any others
        largest = self.plan.largest if form.activations else form.largest
        anew = partial(
            quantize,
            bits=form.bits,
            block=form.block or inputs,
            dtype=scales,
            clip=self.plan.clip and form.bits == 4,
            importance=None if stored else source.importance,
            largest=largest,
        )
        if form.float8:
            anew = partial(quantize_float8, dtype=scales)
        if stored is not None:
            own = self._kept(source, stored, largest)
            for part in strips(inputs, outputs):
                exact = stored.part(part).dequantised()
                weight = own.part(part) if own else anew(exact)
                yield Strip.of(part, weight, exact, own=own is not None)
            return
        for part, exact in self.floats(source):
            yield Strip.of(part, source.codes.part(part) if source.codes else anew(exact), exact)

    def _kept(
        self, source: Source, stored: QuantizedWeight, largest: int | None
    ) -> QuantizedWeight | None:
        """The checkpoint's codes as a graph takes them; None where it does not."""
        form, plan = source.form, self.plan
        assert form is not None and plan is not None
        if form.float8 != stored.is_float8:
            return None
        largest = None if stored.is_float8 else largest
        asked = form.bits, form.block or len(stored.codes), plan.scales
        found = fitted(stored, *asked, largest=largest)
        if found is None or found.zeros is None:
            return found
        if form.activations or not source.transposed:  # nodes of codes, and tables, have no such
            return None
        return found if plan.zero_points else found.with_offsets(plan.scales)

    def floats(self, source: Source) -> Iterator[tuple[slice, Tensor]]:
        """A product's weight in float32 before it is quantised, some outputs at a time: [K, n]."""
        outputs, inputs = source.shape
        whole = None if self._is_whole(source) else self._columns(source)
        for part in strips(inputs, outputs):
            yield part, self._columns(source, part) if whole is None else whole[:, part]

    def _columns(self, source: Source, rows: slice | None = None) -> Tensor:
        """A weight in float32 with an output in each column, of an embedding a row of it."""
        weight = self._read(source, torch.float32, rows)
        return weight if source.transposed else weight.t().contiguous()

    def is_packed(self, source: Source) -> bool:
        """Whether the checkpoint stores a parameter in a quantised form."""
        packed = self.checkpoint.packed
        return packed is not None and any(name in packed.weights for name in source.names)

    def _read(self, source: Source, dtype: torch.dtype, rows: slice | None = None) -> Tensor:
        """One parameter as the checkpoint has it, but for its fold; of its only tensor some
        `rows`."""
        if source.fold is None:
            return self._unfolded(source, dtype, rows)
        folded = source.fold.applied(self._unfolded(source, torch.float32, rows), rows)
        return rounded(folded, dtype, f"{source.names[0]}, scaled by awq=on,")

    def _unfolded(self, source: Source, dtype: torch.dtype, rows: slice | None) -> Tensor:
        """One parameter as the checkpoint has it."""
        tensors = zip(source.names, source.changes, strict=True)
        parts = (self._part(name, change, source.stored, dtype, rows) for name, change in tensors)
        whole = next(parts)
        if len(source.names) > 1:  # a vector may have axes of length 1 before it
            whole = torch.cat([part.reshape(-1, *source.shape[1:]) for part in (whole, *parts)])
        shape = source.stored_shape or source.shape
        whole = whole.reshape(-1, *shape[1:]) if rows else whole.reshape(shape)
        if source.stored_shape:
            whole = _with_zeros(whole, source.shape)
        return whole.t().contiguous() if source.transposed else whole.contiguous()

    def quantized(self, source: Source) -> QuantizedWeight | None:
        """One parameter in the codes that the checkpoint stores, [K, N]: K inputs, N outputs.

        None where it stores floats, or where what it stores is not the whole of the parameter:
        `read` gives the floats then.
        """
        stored, changed = source.stored, any(source.changes) or source.fold is not None
        changed = changed or bool(source.stored_shape)
        if changed or stored.rows or (stored.factor, stored.offset) != (1, 0):
            return None
        return self.checkpoint.quantized(source.names[0]) if len(source.names) == 1 else None

    def _part(
        self,
        name: str,
        change: str,
        stored: Stored,
        dtype: torch.dtype,
        rows: slice | None = None,
    ) -> Tensor:
        """One stored tensor, or some rows of it, as a parameter has it, in a dtype."""
        tensor = self.checkpoint.read(name)
        if change and self.checkpoint.lora is not None:
            tensor = self.checkpoint.lora.merged(change, tensor)
        if stored.rows:
            tensor = tensor[list(stored.rows)]
        if rows is not None:
            tensor = tensor[rows]
        if (stored.factor, stored.offset) != (1, 0):
            tensor = tensor.float() * stored.factor + stored.offset
        return rounded(tensor, dtype, f"{self.checkpoint.files[name].name}: {name}")


def _laid_out(
    source: Source, dtype: torch.dtype, parts: Iterable[tuple[slice, QuantizedWeight]]
) -> Tensor:
    """A quantised parameter as a module wants it, from some of its outputs after others."""
    whole = torch.empty(source.shape[::-1], dtype=dtype)
    for outputs, weight in parts:
        whole[:, outputs] = weight.dequantised(dtype)
    return whole if source.transposed else whole.t().contiguous()


def _with_zeros(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor at the beginning of a larger one."""
    whole = tensor.new_zeros(shape)
    whole[tuple(map(slice, tensor.shape))] = tensor
    return whole
