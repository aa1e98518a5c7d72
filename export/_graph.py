"""An ONNX graph as the rules of `export.rules` look at it: who makes a value, its type and rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import onnx
from onnx import numpy_helper, shape_inference

Node = Any  # onnx.NodeProto; onnx has no types of its own


@dataclass
class Graph:
    """A model, the bodies of its If, Loop and Scan nodes too; its values looked up by name."""

    opset: int
    nodes: list[Node]
    domains: set[str]
    inputs: set[str]
    outputs: set[str]
    makers: dict[str, Node]
    tensors: dict[str, Any]  # initializers and what Constant nodes hold, by name
    types: dict[str, int] = field(default_factory=dict)  # TensorProto.DataType
    shapes: dict[str, tuple[int | str | None, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any) -> Graph:
        """Read a model whose weights need not be loaded.

        Where ONNX finds its types contradictory they are taken as they stand.
        """
        with suppress(shape_inference.InferenceError):
            model = shape_inference.infer_shapes(model)
        graph = model.graph
        parts = list(_with_bodies(graph))
        nodes = [node for part in parts for node in part.node]
        makers = {output: node for node in nodes for output in node.output}
        tensors = {tensor.name: tensor for part in parts for tensor in part.initializer}
        for node in nodes:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                tensors[node.output[0]] = node.attribute[0].t
        found = cls(
            opset=max((o.version for o in model.opset_import if o.domain == ""), default=0),
            nodes=nodes,
            domains={node.domain for node in nodes},
            inputs={value.name for value in graph.input},
            outputs={value.name for value in graph.output},
            makers=makers,
            tensors=tensors,
        )
        for part in parts:
            for value in (*part.value_info, *part.input, *part.output):
                found._note(value)
        for name, tensor in tensors.items():
            found.types[name], found.shapes[name] = tensor.data_type, tuple(tensor.dims)
        return found

    def _note(self, value: Any) -> None:
        kind = value.type.tensor_type
        self.types[value.name] = kind.elem_type
        if kind.HasField("shape"):
            dims = (d.dim_value if d.HasField("dim_value") else d.dim_param for d in kind.shape.dim)
            self.shapes[value.name] = tuple(dims)

    def given(self, node: Node, place: int) -> str:
        """The name of an input, empty where it was left out."""
        return node.input[place] if place < len(node.input) else ""

    def rank(self, name: str) -> int | None:
        return len(self.shapes[name]) if name in self.shapes else None

    def constant(self, name: str) -> bool:
        return not name or name in self.tensors or self._folds(name)

    def _folds(self, name: str) -> bool:
        """Whether a value is made of constants alone."""
        maker = self.makers.get(name)
        if maker is None or maker.op_type == "Constant":
            return maker is not None
        return bool(maker.input) and all(self.constant(n) for n in maker.input)

    def most(self, name: str) -> int | None:
        """The largest value that a size can have, through the operators that sizes are made by."""
        if name in self.tensors:
            return int(numpy_helper.to_array(self.tensors[name]).max())
        maker = self.makers.get(name)
        if maker is None:
            return None
        bounds = [self.most(n) for n in maker.input if n]
        if maker.op_type == "Min":
            known = [b for b in bounds if b is not None]
            return min(known) if known else None
        if maker.op_type in ("Reshape", "Squeeze", "Unsqueeze", "Cast", "Identity", "Concat"):
            return bounds[0] if bounds else None
        return None


def _with_bodies(graph: Any) -> Iterator[Any]:
    """A graph and those inside it; names are unique across all of them."""
    yield graph
    for node in graph.node:
        for entry in node.attribute:
            for body in (entry.g, *entry.graphs) if entry.HasField("g") else entry.graphs:
                yield from _with_bodies(body)


def attribute(node: Node, name: str, default: Any = None) -> Any:
    """An attribute's value."""
    for entry in node.attribute:
        if entry.name == name:
            return onnx.helper.get_attribute_value(entry)
    return default
