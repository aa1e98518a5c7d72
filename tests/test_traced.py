"""Selectors and mergers as ONNX graphs: as eager with an image's tokens, and with none."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from edgeprune.export.trace import End, to_graph
from edgeprune.policies import _clusters, _diverse, _raters, _select
from edgeprune.policies._sizes import least
from tests.graphs import NEVER

TOKENS, WIDTH = 40, 16


class Every(nn.Module):
    """Whatever runs in the decoder, where a call has TOKENS visual tokens or none."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, tokens: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        live = tokens.shape[0]
        keep = least(self.count, live)
        shares = _raters.similarity(tokens, text)
        taken = _diverse.unlike(tokens, text[:2], [self.count, 1], tokens.new_zeros(live))
        return (
            *_clusters.clusters(tokens, keep),
            _diverse.determinant(tokens, self.count, keep),
            _select.top(_raters.rated(shares, _raters.raters(shares)), keep),
            _select.top(taken, least(self.count + 1, live)),
        )


class Pairs(nn.Module):
    """What runs in the vision graph, where every size is fixed."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, tokens: Tensor) -> Tensor:
        order = _select.ranked(tokens[:, 0], TOKENS)[3:]
        return _diverse.without_pairs(tokens, order, self.count)


def _ends(names: list[str]) -> list[End]:
    return [End(name, name) for name in names]


def _run(module: nn.Module, examples: tuple[Tensor, ...], *calls: tuple[Tensor, ...]) -> Any:
    """The outputs of the module's graph for each of some inputs, and the operators it has."""
    shapes = tuple({0: Dim.DYNAMIC} for _ in examples) if len(examples) > 1 else None
    outputs = module(*examples)
    names = [f"output{n}" for n in range(len(outputs) if isinstance(outputs, tuple) else 1)]
    inputs = ["tokens", "text"][: len(examples)]
    graph = to_graph(module, examples, shapes, _ends(inputs), _ends(names), 24)
    data = ir.to_proto(graph).SerializeToString()
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    feeds = [{n: x.numpy() for n, x in zip(inputs, call, strict=True)} for call in calls]
    return [session.run(None, feed) for feed in feeds], {node.op_type for node in graph.graph}


def _tokens(seed: int, rows: int = TOKENS) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [1, 12])
def test_a_graph_chooses_as_eager_does_and_lets_nothing_pass(count: int) -> None:
    module = Every(count)
    calls = [(_tokens(2), _tokens(3, 5)), (_tokens(4, 0), _tokens(5, 2))]
    found, operators = _run(module, (_tokens(0), _tokens(1, 7)), *calls)
    assert not operators & NEVER
    for graph, call in zip(found, calls, strict=True):
        for ours, theirs in zip(graph, module(*call), strict=True):
            assert len(ours) == min(len(theirs), len(call[0]))
            np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)


@pytest.mark.parametrize("count", [1, 30])
def test_a_graph_removes_pairs_as_eager_does(count: int) -> None:
    tokens = _tokens(1)
    found, operators = _run(Pairs(count), (_tokens(0),), (tokens,))
    assert not operators & NEVER
    assert found[0][0].tolist() == Pairs(count)(tokens).tolist()
