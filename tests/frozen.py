"""Bundles for tests, made the short way: no calibration, no parity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.schedules import planned
from edgeprune.bundle import Bundle
from edgeprune.dial import on_common_sites
from edgeprune.export import parity
from edgeprune.export.comparison import Models
from edgeprune.export.dialogue import Graphs
from edgeprune.export.exporter import ExportRequest, export
from edgeprune.export.ratios import Setting
from edgeprune.measured import ParityRecord
from edgeprune.models import Adapter, open_model
from edgeprune.models._processor import Processor, Prompt, random_prompt
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
    options: Mapping[str, str] | None = None,
) -> Path:
    """Export a method; where it needs a schedule that is `counts`, or made up for the ratio."""
    adapter = open_model(str(model), size=size, images=images, frames=frames)
    spec = PruneSpec(method, cr, options=options or {})
    policy, processor = make(spec), Processor(adapter)
    plan = planned(policy, adapter.shape, cr, counts)
    why = "left out by a test"
    request = ExportRequest("tiny", spec, plan, folder, target, dtype, weights, no_parity=why)
    return export(request, adapter, policy, processor, []).path


def dialed(
    folder: Path,
    spec: PruneSpec,
    counts: Mapping[float, tuple[int, ...]],
    *,
    model: str | Path = "demo",
    target: str = "cpu",
    dtype: str = "fp32",
    parity: int = 0,
) -> Path:
    """Export a method at several ratios, each with the counts of its schedule or with its own."""
    adapter, policy = open_model(str(model)), make(spec)
    plans = [planned(policy, adapter.shape, cr, own) for cr, own in counts.items()]
    specs = [replace(spec, cr=cr) for cr in counts]
    dial = tuple(map(Setting, specs, on_common_sites(plans)))
    why = "" if parity else "left out by a test"
    request = ExportRequest(
        "tiny", specs[0], dial[0].plan, folder, target, dtype, no_parity=why, dial=dial
    )
    shape = adapter.shape
    prompts = [random_prompt(adapter.pixels, shape.vocabulary, seed) for seed in range(parity)]
    return export(request, adapter, policy, Processor(adapter), prompts).path


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
