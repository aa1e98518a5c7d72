"""The bundle's one weights file, streamed from the checkpoint a tensor at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir
import torch
from torch import Tensor, nn

from edgeprune.errors import ExportError
from edgeprune.lowering import DTYPES
from edgeprune.models import Adapter
from edgeprune.models._rounding import NAMES

WEIGHTS = "weights.bin"
ALIGNMENT = 4096  # a page, so that a runtime may map tensors in place
INLINE = 1 << 20  # bytes; constants of the graph, such as indices, stay in it below this

Progress = Callable[[int, int], None]


class WeightsFile:
    """Appends tensors to weights.bin and points initializers at them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stream: BinaryIO = (folder / WEIGHTS).open("wb")

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
        """Give every weight of a traced graph its bytes; each is read once and let go."""
        sources, tables = adapter.sources(module), dict(module.named_buffers())
        values = list(model.graph.initializers.values())
        for done, value in enumerate(values):
            name = value.name or ""
            if name in sources:
                value.const_value = self._append(name, adapter.read(sources[name], dtype))
            elif name in tables:
                value.const_value = self._append(name, tables[name])
            elif value.const_value is None or value.const_value.nbytes > INLINE:
                raise ExportError(f"the traced graph has a large tensor of unknown origin: {name}")
            progress(done + 1, len(values))
        if lost := sources.keys() - model.graph.initializers.keys():
            raise ExportError(f"the traced graph lost weights: {', '.join(sorted(lost))}")

    def _append(self, name: str, tensor: Tensor) -> ir.ExternalTensor:
        self.stream.write(b"\0" * (-self.stream.tell() % ALIGNMENT))
        offset, data = self.stream.tell(), tensor.detach().contiguous()
        self.stream.write(data.reshape(-1).view(torch.uint8).numpy().data)
        return ir.ExternalTensor(
            WEIGHTS,
            offset,
            data.nbytes,
            ir.DataType(DTYPES[NAMES[data.dtype]].onnx),
            shape=ir.Shape(data.shape),
            name=name,
            base_dir=self.folder,
        )
