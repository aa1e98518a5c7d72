"""The bundle's one weights file, streamed from the checkpoint a tensor at a time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from edgeprune.errors import ExportError
from edgeprune.export.products import Packed, ProductForm, product_of
from edgeprune.export.quantised_table import TableForm, gathers_of
from edgeprune.lowering import DTYPES
from edgeprune.models import Adapter
from edgeprune.models._rounding import NAMES
from edgeprune.models._weight_source import Source

WEIGHTS = "weights.bin"
ALIGNMENT = 4096  # a page, so that a runtime may map tensors in place
INLINE = 1 << 20  # bytes; constants of the graph, such as indices, stay in it below this

Progress = Callable[[int, int], None]


@dataclass
class Stored:
    """How the weights of products were stored."""

    tensors: Counter[str] = field(default_factory=Counter)  # by kind: float, int8, int4
    packed: int = 0  # of these, those that the checkpoint stores in a quantised form
    own: int = 0  # and of these, those whose codes are the checkpoint's own
    shifted: int = 0  # and of these, those whose codes have zero points
    numbers: int = 0  # of those that are quantised, or were left as floats by a choice
    bytes: int = 0  # of these, scales too
    error: float = 0.0  # sums of squares: of what quantising changed
    power: float = 0.0  # and of the weights that it changed


class WeightsFile:
    """Appends tensors to weights.bin and points initializers at them."""

    def __init__(
        self, folder: Path, form: ProductForm, integers: ProductForm | None, table: TableForm
    ) -> None:
        """`form` is of products, `integers` of those whose inputs are codes too."""
        self.folder, self.form, self.table, self.stored = folder, form, table, Stored()
        self.integers = integers
        self.stream: BinaryIO = (folder / WEIGHTS).open("wb")
        self._placed = dict[str, ir.ExternalTensor]()  # floats, by parameter

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def fill(
        self,
        model: ir.Model,
        module: nn.Module,
        adapter: Adapter,
        dtype: torch.dtype,
        progress: Progress,
    ) -> None:
        """Give every weight of a traced graph its bytes; each is read once and then freed."""
        sources, tables = adapter.sources(module), dict(module.named_buffers())
        reader = adapter.reader
        values = list(model.graph.initializers.values())
        for done, value in enumerate(values):
            name = value.name or ""
            if name in sources and sources[name].form is not None:
                self._quantise(model, value, adapter, sources[name], dtype)
            elif name in self._placed:
                value.const_value = self._placed[name]
            elif name in sources:
                self.stored.tensors["float"] += sources[name].transposed
                self.stored.packed += reader.is_packed(sources[name])
                self._placed[name] = self._append_rows(name, reader.rows(sources[name], dtype))
                value.const_value = self._placed[name]
                if adapter.is_chosen(name):
                    self.stored.numbers += math.prod(sources[name].shape)
                    self.stored.bytes += self._placed[name].nbytes
            elif name in tables:
                value.const_value = self._append(name, tables[name])
            elif value.const_value is None or value.const_value.nbytes > INLINE:
                raise ExportError(f"the traced graph has a large tensor of unknown origin: {name}")
            progress(done + 1, len(values))
        if lost := sources.keys() - model.graph.initializers.keys():
            raise ExportError(f"the traced graph lost weights: {', '.join(sorted(lost))}")

    def _quantise(
        self,
        model: ir.Model,
        weight: ir.Value,
        adapter: Adapter,
        source: Source,
        dtype: torch.dtype,
    ) -> None:
        """Give a weight its codes, and what reads it the nodes that read them."""
        assert source.form is not None
        strips = adapter.reader.strips(source)
        if source.transposed:
            product, form = product_of(weight, source.peak), self.form
            if source.form.activations:
                assert self.integers is not None, "refused as soon as the target is known"
                form = self.integers
            packed = form.pack(product, source.form, strips)
            wide = dtype if product.cast is None else torch.float32
            scales = self._place(model, weight, packed, wide)
            shift = self._shift(model, packed, weight.name or "", wide)
            form.rewire(model, product, source.form, scales, shift)
        else:
            users, shift = gathers_of(weight), None
            packed = self.table.pack(source.shape, strips)
            scales = self._place(model, weight, packed, dtype)
            self.table.rewire(model, weight, users, scales)
        held = [value.const_value for value in (weight, scales, shift) if value is not None]
        stored = self.stored
        stored.tensors[str(source.form)] += 1
        stored.packed += adapter.reader.is_packed(source)
        stored.own += packed.own
        stored.shifted += shift is not None
        stored.numbers += math.prod(source.shape)
        stored.bytes += sum(tensor.nbytes for tensor in held if tensor is not None)
        stored.error, stored.power = stored.error + packed.error, stored.power + packed.power

    def _place(
        self, model: ir.Model, weight: ir.Value, packed: Packed, dtype: torch.dtype
    ) -> ir.Value:
        """Write codes in place of a weight, and scales beside it; these are returned."""
        name = f"{weight.name}/scale"
        scales = ir.Value(name=name)
        scales.const_value = self._append(name, torch.from_numpy(packed.scales).to(dtype))
        scales.shape, scales.dtype = scales.const_value.shape, scales.const_value.dtype
        codes = self._write(weight.name or "", packed.codes.data, packed.kind, packed.shape)
        weight.const_value, weight.shape, weight.dtype = codes, codes.shape, packed.kind
        model.graph.register_initializer(scales)
        return scales

    def _shift(
        self, model: ir.Model, packed: Packed, weight: str, dtype: torch.dtype
    ) -> ir.Value | None:
        """The zero points of a product's codes, or the offsets of its blocks; None: it has none."""
        data = packed.shift
        if data is None:
            return None
        name = f"{weight}/{'zero' if data.dtype == np.uint8 else 'offset'}"
        value = ir.Value(name=name)
        if data.dtype == np.uint8:
            value.const_value = self._write(name, data.data, ir.DataType.UINT8, data.shape)
        else:
            value.const_value = self._append(name, torch.from_numpy(data).to(dtype))
        value.shape, value.dtype = value.const_value.shape, value.const_value.dtype
        model.graph.register_initializer(value)
        return value

    def _append(self, name: str, tensor: Tensor) -> ir.ExternalTensor:
        return self._append_rows(name, [tensor])

    def _append_rows(self, name: str, pieces: Iterable[Tensor]) -> ir.ExternalTensor:
        """A tensor that comes some rows at a time."""
        offset, shape, kind = self._aligned(), list[int](), ir.DataType.UNDEFINED
        for piece in pieces:
            data = piece.detach().contiguous()
            kind = ir.DataType(DTYPES[NAMES[data.dtype]].onnx)
            self.stream.write(data.reshape(-1).view(torch.uint8).numpy().data)
            shape = [shape[0] + len(data), *shape[1:]] if shape else [*data.shape]
        return self._written(name, offset, kind, shape)

    def _write(
        self, name: str, data: memoryview, kind: ir.DataType, shape: Sequence[int]
    ) -> ir.ExternalTensor:
        offset = self._aligned()
        self.stream.write(data)
        return self._written(name, offset, kind, shape)

    def _aligned(self) -> int:
        """Where the next tensor starts."""
        self.stream.write(b"\0" * (-self.stream.tell() % ALIGNMENT))
        return self.stream.tell()

    def _written(
        self, name: str, offset: int, kind: ir.DataType, shape: Sequence[int]
    ) -> ir.ExternalTensor:
        """The tensor whose bytes were written last, from an offset on."""
        return ir.ExternalTensor(
            WEIGHTS,
            offset,
            self.stream.tell() - offset,
            kind,
            shape=ir.Shape(shape),
            name=name,
            base_dir=self.folder,
        )
