"""Graph passes: each does one thing, `clean` runs them in order."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer


def clean(model: ir.Model, weights: Collection[str]) -> None:
    """Fold constants, merge equal nodes, drop dead ones, give the rest readable names.

    What is computed from one of `weights` is no constant yet: a stand-in of zeros is traced.
    """

    def foldable(node: ir.Node) -> bool | None:
        return False if any(v is not None and v.name in weights for v in node.inputs) else None

    common.InlinePass()(model)
    optimizer.fold_constants(model, onnx_shape_inference=False, should_fold=foldable)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    name_nodes(model)
    for node in model.graph:
        node.metadata_props.clear()


def name_nodes(model: ir.Model) -> None:
    """Names like `layers.7/prune/topk`: the module that a node came from, then its operator."""
    used: Counter[str] = Counter()
    for node in model.graph:
        path = _module_path(node.metadata_props.get("namespace", ""))
        name = "/".join([*path, node.op_type.lower()])
        used[name] += 1
        node.name = name if used[name] == 1 else f"{name}.{used[name] - 1}"


def _module_path(namespace: str) -> list[str]:
    """`: a.Decoder/layers.7: b.Layer/layers.7.mlp: c.MLP/silu: aten.silu` -> [layers.7, mlp]."""
    modules = [part.partition(": ") for part in namespace.split("/")]
    names = [name for name, _, kind in modules if name and _is_module(kind)]
    if not names:
        return []
    path = re.sub(r"^prune\.(\d+)", lambda m: f"layers.{int(m[1]) - 1}.prune", names[-1])
    return (
        re.sub(r"^((?:layers|encoder\.blocks)\.\d+)\.", r"\1/", path).replace("/", "\0").split("\0")
    )


def _is_module(kind: str) -> bool:
    return kind.startswith(("edgeprune.", "torch.nn.modules."))
