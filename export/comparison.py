"""Compares a draft bundle with the eager model, in float32 and in half precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch

from edgeprune.export import parity, precision
from edgeprune.export.dialogue import Graphs
from edgeprune.export.frame_parity import check_frames
from edgeprune.export.ranges import Proof
from edgeprune.graphs import GraphRecord
from edgeprune.measured import ParityRecord
from edgeprune.models import Adapter
from edgeprune.models._dialogues import Outcome
from edgeprune.models._eager import Eager
from edgeprune.models._memory import parity_bytes
from edgeprune.models._processor import Prompt
from edgeprune.policies import Policy
from edgeprune.progress import Progress
from edgeprune.spec import Plan


@dataclass(frozen=True)
class Models:
    """A model in the dtypes in which it is compared, and what it made of the samples."""

    adapter: Adapter  # with the weights of the bundle
    policy: Policy
    plan: Plan
    dtype: torch.dtype  # of the bundle
    samples: Sequence[Prompt]
    report: Progress
    proof: Proof | None = None  # of what float16 holds

    @cached_property
    def exact(self) -> list[Outcome]:
        """In float32."""
        if self.proof:
            return self.proof.exact
        eager = Eager(self.adapter, self.policy, self.plan)
        return eager.outcomes(self.samples, partial(self.report, "the model in float32"))

    @cached_property
    def half(self) -> list[Outcome]:
        """In half precision, rounded after every operator."""
        if self.proof:
            return self.proof.half
        eager = Eager(self.adapter, self.policy, self.plan, self.dtype)
        return eager.outcomes(self.samples, partial(self.report, "the model in half precision"))

    def rounded(self) -> Eager:
        """Computes in float32 with the values that a graph of the bundle's dtype holds."""
        held = None if self.dtype == torch.float32 else self.dtype
        return Eager(self.adapter, self.policy, self.plan, held=held)


def compare(draft: Path, records: Mapping[str, GraphRecord], models: Models) -> ParityRecord:
    """Compare a draft with the eager model; ParityError where it is not the same."""
    report, samples, half = models.report, models.samples, models.dtype != torch.float32
    eager, graph = None, None
    if half:
        found = None
        if models.dtype in precision.RUNS:
            graphs = Graphs(draft, records, models.rounded())
            found = graphs.outcomes(samples, partial(report, "the graph in half precision"))
        told = models.plan, models.dtype, models.exact, models.half, found
        eager, graph = precision.measure(*told)
    rounded = models.rounded()
    graphs = Graphs(draft, records, rounded, wide=half)
    need = parity_bytes(models.adapter, len(samples)) / 1e9
    checked = parity.check(graphs, rounded, samples, partial(report, f"parity in {need:.1f} GB"))
    return replace(checked, eager=eager, graph=graph)


def compare_frames(draft: Path, records: Mapping[str, GraphRecord], models: Models) -> float:
    """How far the encoder for a fixed camera is from the eager model; ParityError where it is not
    the same."""
    report, half = (
        partial(models.report, "parity of changed patches"),
        models.dtype != torch.float32,
    )
    return check_frames(draft, records, models.rounded(), models.samples, report, wide=half)
