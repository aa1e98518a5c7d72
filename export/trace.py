"""Tracing a module of ours into an ONNX graph without its weights.

Parameters stand in as one zero seen through a stride of 0, so tracing a 13B model needs no more
memory than tracing a small one; the initializers are then pointed at the bundle's weights file.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch.export import Dim

from edgeprune.errors import ExportError
from edgeprune.export.assumptions import Sizes, check_sizes
from edgeprune.export.delta_rule import lower_rules
from edgeprune.export.dialects import Dialect
from edgeprune.export.fused import fuse
from edgeprune.export.passes import add_token, clean
from edgeprune.export.translations import translations
from edgeprune.graphs import GraphRecord, TensorRecord
from edgeprune.lowering import DTYPES
from edgeprune.models._decoder import Decoder
from edgeprune.spec import Plan

_DTYPES = {
    **{ir.DataType(dtype.onnx): dtype.name for dtype in DTYPES.values()},
    ir.DataType.INT64: "int64",
}

HIDDEN = "hidden."
"""With a number, the name of the hidden states that enter the layer of this index, or leave the
last: of the decoder, or of the encoder's blocks."""

Shapes = Any  # torch.export's nested description of dynamic dimensions


def strip_weights(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Replace a meta module's parameters by stand-ins of the same shape and no size."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            stand_in = torch.zeros((), dtype=dtype).expand(parameter.shape)
            setattr(owner, name, nn.Parameter(stand_in, requires_grad=False))
    return module.eval()


@dataclass(frozen=True)
class End:
    """An input or output of a graph: its name, what it is for, of which decoder layer or tile."""

    name: str
    role: str
    layer: int | None = None  # 1-based
    tile: int | None = None  # 1-based


@dataclass(frozen=True)
class Traced:
    """A graph without its weights, and what the bundle's manifest says of it."""

    model: ir.Model
    record: GraphRecord


def decoder_graph(decoder: Decoder, dtype: torch.dtype, dialect: Dialect) -> Traced:
    """One graph for prefill, decode and later turns; see Decoder.forward for the shapes."""
    config, plan = decoder.config, decoder.plan
    layers = range(len(config.layers))
    dynamic = {1: Dim.DYNAMIC}
    slots = {"key": {2: Dim.DYNAMIC}, "value": {2: Dim.DYNAMIC}}  # states have one size
    caches = [tuple(slots.get(kind) for kind in layer.keeps) for layer in config.layers]
    shapes: Shapes = (dynamic, dynamic, dynamic, None, None, caches)
    plain = ("prefix_ids", "visual", "text_ids", "position", "lengths")
    inputs, outputs = [End(name, name) for name in plain], [End("logits", "logits")]
    kept = [(n, kind) for n in layers for kind in config.layers[n].keeps]
    inputs += [End(f"past_{kind}.{n}", f"past_{kind}", n + 1) for n, kind in kept]
    outputs += [End(f"present_{kind}.{n}", f"present_{kind}", n + 1) for n, kind in kept]
    outputs += [End(f"kept.{stage.layer}", "kept", stage.layer) for stage in plan.in_decoder]
    args = _example(decoder, dtype)
    if decoder.reads_indices:
        shapes = (*shapes, {0: Dim.DYNAMIC})
        inputs.append(End("visual_indices", "visual_indices"))
        args = (*args, torch.arange(max(2, plan.encoded)))
    if plan.dialed:
        if not decoder.reads_indices:
            args, shapes = (*args, None), (*shapes, None)
        inputs.append(End("counts", "counts"))
        args, shapes = (*args, torch.tensor(plan.counts)), (*shapes, None)
    ends, states = (inputs, outputs), 1 + len(layers)
    tokens = plan.encoded + config.max_positions
    model = to_graph(
        decoder, args, shapes, *ends, dialect.opset, _calls(plan), states=states, tokens=tokens
    )
    if dialect.fused:
        fuse(model, kept=HIDDEN)
    if dialect.token:
        add_token(model.graph)
        outputs.insert(1, End("token", "token"))
    name_sizes(model.graph.inputs, inputs, dialect.cache)
    name_sizes(model.graph.outputs, outputs, dialect.cache)
    return Traced(model, record_of(model.graph, inputs, outputs))


def _example(decoder: Decoder, dtype: torch.dtype) -> tuple[Any, ...]:
    """Inputs whose sizes are all different and above 1, so that none is taken for a constant."""
    config, prefix, text = decoder.config, 5, 7
    visual = max(2, decoder.plan.encoded)
    layers = range(len(config.layers))
    caches = [config.nothing_kept(n, visual + 37 + n, dtype) for n in layers]
    return (
        torch.zeros(1, prefix, dtype=torch.int64),
        torch.zeros(1, visual, config.visual_width, dtype=dtype),
        torch.zeros(1, text, dtype=torch.int64),
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(len(caches), dtype=torch.int64),
        caches,
    )


def _calls(plan: Plan) -> list[Sizes]:
    """The sizes of a prefill, a decode step and a later turn, at their least and well above."""
    prefix, visual, text = (("prefix_ids", 1), ("visual", 1), ("text_ids", 1))
    image, none = plan.encoded, 0
    sizes = ((0, image, 1), (1, image, 9), (64, image, 64), (0, none, 1), (0, none, 9))
    return [{prefix: p, visual: v, ("visual_indices", 0): v, text: t} for p, v, t in sizes]


def to_graph(
    module: nn.Module,
    args: tuple[Any, ...],
    shapes: Shapes,
    inputs: Sequence[End],
    outputs: Sequence[End],
    opset: int,
    calls: Sequence[Sizes] = (),
    *,
    states: int = 0,
    tokens: int = 0,
) -> ir.Model:
    """The module as a graph whose ends have these names; `calls` are those it must be right for.

    The last `states` outputs of the module are hidden states between its layers. In the graph they
    are no outputs, but values named `hidden.0`, `hidden.1` and so on, where it can be cut. A call
    has at most so many `tokens`, where there is linear attention.
    """
    with torch.no_grad(), _quiet():
        program = torch.export.export(module, args, dynamic_shapes=shapes, strict=False)
        check_sizes(program, calls)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            optimize=False,
            opset_version=opset,
            custom_translation_table=translations(opset),
            verbose=False,
        )
    if exported is None:
        raise ExportError("torch.onnx.export returned no graph")
    model = exported.model
    lower_rules(model, tokens)
    hidden = [End(f"{HIDDEN}{number}", "hidden") for number in range(states)]
    _rename(model.graph.outputs, [*outputs, *hidden])
    _rename(model.graph.inputs, inputs)  # an output that is an input keeps the input's name
    clean(model, {name for name, _ in module.named_parameters()})
    del model.graph.outputs[len(outputs) :]
    _part(model.graph, outputs)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter warns of its own deprecations and of a torchvision that is not needed."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


def _part(graph: ir.Graph, ends: Sequence[End]) -> None:
    """Give an output that is an input or another output a value of its own."""
    for index, (value, end) in enumerate(zip(list(graph.outputs), ends, strict=True)):
        if value.name != end.name:
            copied = ir.node("Identity", [value], name=f"{end.name}/identity")
            own = copied.outputs[0]
            own.name, own.shape, own.type = end.name, value.shape, value.type
            graph.append(copied)
            graph.outputs[index] = own


def _rename(values: Sequence[ir.Value], ends: Sequence[End]) -> None:
    if len(values) != len(ends):
        names = [end.name for end in ends]
        raise ExportError(f"the traced graph has {len(values)} ends, want {len(ends)}: {names}")
    for value, end in zip(values, ends, strict=True):
        value.name = end.name


def name_sizes(values: Sequence[ir.Value], ends: Sequence[End], cache: str = "") -> None:
    """Readable names for the open sizes, in place of the tracer's symbols.

    A cache that is written in place has `capacity.0` slots, one that grows has `past.0` before and
    `present.0` after.
    """
    names = {
        "prefix_ids": "prefix",
        "visual": "visual",
        "visual_indices": "visual",
        "text_ids": "text",
    }
    for value, end in zip(values, ends, strict=True):
        label = names.get(end.role)
        if end.role == "kept":
            label = f"kept.{end.layer}"
        elif end.layer is not None:
            kind = end.role.partition("_")[0] if cache == "grow" else "capacity"
            label = f"{kind}.{end.layer - 1}"
        if label and value.shape is not None:
            sizes = [label if isinstance(d, ir.SymbolicDim) else d for d in value.shape]
            value.shape = ir.Shape(sizes)


def record_of(graph: ir.Graph, inputs: Sequence[End], outputs: Sequence[End]) -> GraphRecord:
    """What the manifest says of a graph's inputs and outputs."""
    return GraphRecord(
        tuple(map(_tensor, graph.inputs, inputs)), tuple(map(_tensor, graph.outputs, outputs))
    )


def _tensor(value: ir.Value, end: End) -> TensorRecord:
    if value.shape is None or value.dtype not in _DTYPES or value.name != end.name:
        raise ExportError(f"the traced graph has {value}, want {end.name}")
    dims = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
    return TensorRecord(end.name, _DTYPES[value.dtype], dims, end.role, end.layer, end.tile)
