"""Bundles for tests, made the short way: no calibration, no parity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.schedules import planned
from edgeprune.bundle import Bundle, ParityRecord
from edgeprune.export import parity
from edgeprune.export.comparison import Models
from edgeprune.export.dialogue import Graphs
from edgeprune.export.exporter import ExportRequest, export
from edgeprune.models import Adapter, open_model
from edgeprune.models._processor import Processor, Prompt
from edgeprune.models._rounding import TORCH
from edgeprune.policies import Policy, make
from edgeprune.progress import silent
from edgeprune.spec import Plan, PruneSpec
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
    images: int = 1,
    frames: int | None = None,
) -> Path:
    """Export a method; where it needs a schedule that is `counts`, or made up for the ratio."""
    adapter = open_model(str(model), size=size, images=images, frames=frames)
    spec = PruneSpec(method, cr)
    policy, processor = make(spec), Processor(adapter)
    plan = planned(policy, adapter.shape, cr, counts)
    why = "left out by a test"
    request = ExportRequest("tiny", spec, plan, folder, target, dtype, weights, no_parity=why)
    return export(request, adapter, policy, processor, []).path


def compared(
    bundle: Path,
    adapter: Adapter,
    policy: Policy,
    prompts: Sequence[Prompt],
    plan: Plan | None = None,
) -> ParityRecord:
    """The parity of a bundle's graphs, computing in float32, with the eager model of a policy."""
    manifest = Bundle.open(bundle, verify=False).manifest
    dtype = TORCH[manifest.dtype]
    models = Models(adapter, policy, plan or manifest.prune.plan, dtype, prompts, silent)
    rounded = models.rounded()
    graphs = Graphs(bundle, manifest.graphs, rounded, wide=dtype != TORCH["fp32"])
    return parity.check(graphs, rounded, prompts)
