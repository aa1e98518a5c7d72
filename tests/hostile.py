"""Bundles whose graphs, tokenizers and manifests are not the exported ones, their hashes mended."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from edgeprune.bundle import sha256


def replace_file(bundle: Path, name: str, data: bytes) -> None:
    """Another file under the same name, with the hash that the manifest then needs."""
    (bundle / name).write_bytes(data)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(data), "sha256": sha256(bundle / name)}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def edit_graph(bundle: Path, name: str, change: Callable[[Any], object]) -> None:
    model = onnx.load(bundle / name, load_external_data=False)
    change(model)
    replace_file(bundle, name, model.SerializeToString())


def end(kind: str, name: str) -> Callable[[Any], Any]:
    return lambda model: next(v for v in getattr(model.graph, kind) if v.name == name)


def set_size(kind: str, name: str, axis: int, size: int) -> Callable[[Any], object]:
    def change(model: Any) -> None:
        end(kind, name)(model).type.tensor_type.shape.dim[axis].dim_value = size

    return change
