"""One block of the vision encoder as a graph of its own, for `edgeprune profile` to time.

A bundle's vision graph has fixed sizes, so what the encoder would take with fewer patches cannot be
timed with it. This graph is the same block with the same weights and any number of patches.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim

from edgeprune.export.trace import End, to_graph
from edgeprune.models._vision import Vision


class Block(nn.Module):
    """The last block with full attention, under its own name."""

    def __init__(self, vision: Vision) -> None:
        super().__init__()
        self.number, self.tower = vision.encoder.looked_at[-1], [vision.encoder]  # no submodule
        blocks = nn.ModuleDict({str(self.number): vision.encoder.blocks[self.number]})
        self.encoder = nn.Module()
        self.encoder.blocks = blocks
        for name, buffer in vision.encoder.named_buffers(recurse=False):
            self.encoder.register_buffer(name, buffer)

    def forward(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """[sequences, n, width] -> the same; `rows` int64 [sequences, n], of rotary tables."""
        tower = self.tower[0]
        return tower.alone(self.number, hidden, rows)


def block_graph(block: Block, width: int, dtype: torch.dtype, opset: int) -> ir.Model:
    """hidden [sequences, n, width], rows int64 [sequences, n] -> output, like hidden."""
    inputs = [End("hidden", "hidden"), End("rows", "rows")]
    args = torch.zeros(3, 5, width, dtype=dtype), torch.zeros(3, 5, dtype=torch.int64)
    sizes = {0: Dim("sequences"), 1: Dim("patches")}
    model = to_graph(block, args, (sizes, sizes), inputs, [End("output", "hidden")], opset)
    for value in (*model.graph.inputs, *model.graph.outputs):
        rest = [] if value.shape is None else value.shape[2:]
        value.shape = ir.Shape(["sequences", "patches", *rest])
    return model
