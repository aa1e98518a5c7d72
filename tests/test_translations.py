"""Activations as nodes: a half-precision graph holds their constants in float32."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from edgeprune.export.dialects import DIALECTS
from edgeprune.export.passes import HALF
from edgeprune.export.trace import End, to_graph
from edgeprune.models._layers import ACTIVATIONS


class Activation(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.name](x)


@pytest.mark.parametrize("opset", sorted({dialect.opset for dialect in DIALECTS.values()}))
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_no_constant_of_an_activation_is_rounded(name: str, opset: int) -> None:
    x = torch.zeros(2, 3, dtype=torch.bfloat16)
    graph = to_graph(Activation(name), (x,), None, [End("x", "x")], [End("y", "y")], opset).graph
    constants = [node for node in graph if node.op_type == "Constant"]
    assert not [n for n in constants if n.outputs[0].dtype in HALF or _half(n)]
    assert "CastLike" not in {node.op_type for node in graph}
    assert graph.outputs[0].dtype == graph.inputs[0].dtype


def _half(node: ir.Node) -> bool:
    value = node.attributes.get("value")
    return value is not None and value.as_tensor().dtype in HALF
