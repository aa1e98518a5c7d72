"""Attention as every dialect writes it: windows, scales and biases, against the plain formula."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from edgeprune.export.dialects import DIALECTS
from edgeprune.export.trace import End, to_graph
from edgeprune.models._layers import Scores
from edgeprune.models._ops import Causal, TorchOps

HEADS, KV_HEADS, SIZE = 4, 2, 8
CALLS = (0, 5, 6, 9)
"""Tokens of a dialogue before its first call, after it, after the second and after the third."""
NAMES = ("query", "key", "value", "past_key", "past_value", "length")


class Layer(nn.Module):
    """A layer's attention to its cache."""

    def __init__(self, ops: TorchOps, window: int | None, scale: float | None) -> None:
        super().__init__()
        self.ops, self.window, self.scores = ops, window, Scores(ops, scale)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        past_key: Tensor,
        past_value: Tensor,
        length: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        causal = Causal(length, length + query.shape[2], self.window)
        keys = self.ops.write(past_key, key, length)
        values = self.ops.write(past_value, value, length)
        return self.scores(query, keys, values, causal), keys, values


def formula(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float | None
) -> Tensor:
    """Every token by itself, over the slots that it sees: [1, heads, n, head], of n tokens."""
    mixed = torch.empty_like(query)
    for head in range(HEADS):
        own, shared = query[0, head], head // (HEADS // KV_HEADS)
        for slot in range(len(own)):
            first = 0 if window is None else max(0, slot - window + 1)
            seen = slice(first, slot + 1)
            logits = (key[0, shared, seen] @ own[slot]) * (scale or SIZE**-0.5)
            mixed[0, head, slot] = logits.softmax(0) @ value[0, shared, seen]
    return mixed


def tensors(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a whole dialogue."""
    made = torch.Generator().manual_seed(seed)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    query, key, value = (torch.randn(1, n, CALLS[-1], SIZE, generator=made) for n in heads)
    return query, key, value


def session(module: nn.Module, opset: int) -> ort.InferenceSession:
    query, key, value = tensors(0)
    caches = [torch.zeros(1, KV_HEADS, slots, SIZE) for slots in (13, 13)]
    args = (query, key, value, *caches, torch.tensor([3]))
    open_ = {2: Dim.DYNAMIC}
    names = [[End(name, name) for name in ends] for ends in (NAMES, ("mixed", "keys", "values"))]
    model = to_graph(module, args, (open_,) * 5 + (None,), *names, opset)
    data = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(data, providers=["CPUExecutionProvider"])


def dialogue(run: Any, grows: bool) -> Tensor:
    """What attention gives over three calls, one after the other: [1, heads, n, head]."""
    query, key, value = tensors(1)
    slots = 0 if grows else CALLS[-1] + 4
    caches = [torch.zeros(1, KV_HEADS, slots, SIZE) for _ in range(2)]
    found = []
    for start, end in pairwise(CALLS):
        new = [x[:, :, start:end] for x in (query, key, value)]
        mixed, *caches = run(*new, *caches, torch.tensor([start]))
        found.append(mixed)
    return torch.cat(found, dim=2)


@pytest.mark.parametrize(("window", "scale"), [(None, 0.6), (4, None), (1, 0.6)])
def test_attention_to_a_cache_is_the_formula_in_every_dialect(
    window: int | None, scale: float | None
) -> None:
    wanted = formula(*tensors(1), window, scale)
    eager = Layer(TorchOps(), window, scale)
    torch.testing.assert_close(dialogue(eager, grows=False), wanted)
    eager.scores.wide = True
    torch.testing.assert_close(dialogue(eager, grows=False), wanted)
    for dialect in DIALECTS.values():
        graph = session(Layer(dialect.ops(), window, scale), dialect.opset)

        def run(*args: Tensor, graph: Any = graph) -> list[Tensor]:
            feed = {name: x.numpy() for name, x in zip(NAMES, args, strict=True)}
            return [torch.from_numpy(np.array(x)) for x in graph.run(None, feed)]

        found = dialogue(run, dialect.cache == "grow")
        torch.testing.assert_close(found, wanted, msg=f"{dialect.name} differs")
