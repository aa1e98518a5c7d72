"""One decoder layer as a graph of its own, where a decoder has layers of several kinds."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim

from edgeprune.cost import layer_kind
from edgeprune.export.dialects import Dialect
from edgeprune.export.trace import End, to_graph
from edgeprune.models._decoder import Decoder
from edgeprune.models._decoder_layer import Cache, Rotary
from edgeprune.policies._signals import Segments
from edgeprune.spec import ModelShape


class Layer(nn.Module):
    """One layer, under its own name, with what it keeps."""

    def __init__(self, decoder: Decoder, index: int) -> None:
        super().__init__()
        self.config, self.index = decoder.config, index
        self.layers = nn.ModuleDict({str(index): decoder.layers[index]})
        looked_at = next(n for n, layer in enumerate(decoder.config.layers) if not layer.kernel)
        self.halves = decoder.own_rotary(looked_at).cos.shape[1]

    def forward(
        self,
        hidden: Tensor,  # [1, S, width]
        positions: Tensor,  # int64 [1, S], rows of the rotary tables
        cos: Tensor,  # [n, head / 2]
        sin: Tensor,
        start: Tensor,  # int64 [1], tokens that are kept before the call
        end: Tensor,  # int64 [1], and behind it
        *past: Tensor,  # keys and values, or states
    ) -> tuple[Tensor, ...]:
        """States behind the layer, and what it keeps then."""
        segments, cache = Segments(0, hidden.shape[1], 0), Cache(past, start, end)
        layer = self.layers[str(self.index)]
        hidden, cache, _ = layer(hidden, positions, Rotary(cos, sin), cache, segments)
        return hidden, *cache.kept


def layers_by_kind(decoder: Decoder, shape: ModelShape) -> dict[str, Layer]:
    """The first layer of each kind; none where all layers are of one, which a prefill times."""
    first = dict[str, int]()
    for index in range(shape.layers):
        first.setdefault(layer_kind(shape, index + 1), index)
    return {kind: Layer(decoder, n) for kind, n in first.items()} if len(first) > 1 else {}


def layer_graph(layer: Layer, dtype: torch.dtype, dialect: Dialect) -> ir.Model:
    """The graph for any number of tokens; inputs that the layer does not read are left out."""
    config, index, tokens = layer.config, layer.index, 23
    keeps = config.layers[index].keeps
    past = config.nothing_kept(index, 31, dtype)
    args = (
        torch.zeros(1, tokens, config.width, dtype=dtype),
        torch.ones(1, tokens, dtype=torch.int64),
        torch.zeros(29, layer.halves, dtype=dtype),
        torch.zeros(29, layer.halves, dtype=dtype),
        torch.zeros(1, dtype=torch.int64),
        torch.full((1,), tokens),
        *past,
    )
    names = ["hidden", "positions", "cos", "sin", "start", "end", *(f"past_{k}" for k in keeps)]
    slots = {2: "slots"}
    named: list[dict[int, str]] = [{1: "tokens"}, {1: "tokens"}, {0: "rows"}, {0: "rows"}, {}, {}]
    named += [slots if kind in ("key", "value") else {} for kind in keeps]
    sizes = {"tokens": Dim("tokens"), "rows": Dim("rows"), "slots": Dim("slots")}
    dynamic = tuple({axis: sizes[size] for axis, size in axes.items()} for axes in named)
    shapes = (*dynamic[:6], dynamic[6:])
    inputs = [End(name, name) for name in names]
    outputs = [End("output", "hidden"), *(End(f"present_{k}", f"present_{k}") for k in keeps)]
    model = to_graph(
        layer, args, shapes, inputs, outputs, dialect.opset, tokens=config.max_positions
    )
    by_name = dict(zip(names, named, strict=True))
    for value in list(model.graph.inputs):
        if not value.uses():
            model.graph.inputs.remove(value)
        elif value.shape is not None:
            axes = by_name[value.name or ""]
            dims = [axes.get(axis, size) for axis, size in enumerate(value.shape)]
            value.shape = ir.Shape(dims)
    return model
