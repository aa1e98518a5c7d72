"""Bundles for tests, made the short way: no calibration, no parity."""

from __future__ import annotations

from pathlib import Path

from benchmarks.schedules import planned
from edgeprune.bundle import Bundle
from edgeprune.export.dialogue import Graphs
from edgeprune.export.exporter import ExportRequest, export
from edgeprune.models import open_model
from edgeprune.models._processor import Processor
from edgeprune.models._reference import Reference
from edgeprune.policies import make
from edgeprune.spec import PruneSpec
from edgeprune.tiling import Size


def frozen(
    folder: Path,
    method: str,
    cr: float = 1,
    *,
    model: str | Path = "demo",
    target: str = "cpu",
    dtype: str = "fp32",
    weights: str = "float",
    counts: tuple[int, ...] = (),
    size: Size | None = None,
) -> Path:
    """Export a method; where it needs a schedule that is `counts`, or made up for the ratio."""
    adapter, spec = open_model(str(model), size=size), PruneSpec(method, cr)
    policy, processor = make(spec), Processor(adapter)
    plan = planned(policy, adapter.shape, cr, counts)
    why = "left out by a test"
    request = ExportRequest("tiny", spec, plan, folder, target, dtype, weights, no_parity=why)
    return export(request, adapter, policy, processor, []).path


def compared(bundle: Path, reference: Reference) -> Graphs:
    """A float32 bundle's graphs, to be compared with the reference of the same plan."""
    return Graphs(bundle, Bundle.open(bundle).manifest.graph, reference.decoder)
