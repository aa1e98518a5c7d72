"""Whether the engines of a target take a bundle: by the rules of `check`, and by TensorRT-RTX."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from edgeprune.bundle import Bundle
from edgeprune.export.check import check_graph
from edgeprune.lowering import TARGETS
from edgeprune.runtime.build import TEXT_CAPACITY, BuildRequest, build

GPUS = [target for target in TARGETS if target != "cpu"]


def compiled(bundle: Path, text_capacity: int = TEXT_CAPACITY) -> dict[str, Any]:
    """The engines of a bundle, both profiles in one; the bundle's nodes stay as they were."""
    if sys.platform != "linux":  # the dev extra brings it there, so its absence is a fault
        pytest.importorskip("tensorrt_rtx")
    built = build(BuildRequest(bundle, "trt-rtx", text_capacity))
    found: dict[str, Any] = json.loads((built.path / "engine.json").read_text())["engines"]
    assert list(found["decoder"]["profiles"]) == ["prefill", "decode"]
    assert all((built.path / engine["file"]).stat().st_size > 0 for engine in found.values())
    return found


def assert_accepted(bundle: Path, target: str, text_capacity: int = TEXT_CAPACITY) -> None:
    """`check` finds no fault in any graph, and TensorRT-RTX compiles those for RTX cards."""
    for graph in Bundle.open(bundle, verify=False).manifest.graphs:
        (verdict,) = (v for v in check_graph(bundle / graph) if target in v.target.names)
        assert not verdict.problems, verdict.problems[0].message
    if target == "rtx":
        compiled(bundle, text_capacity)
