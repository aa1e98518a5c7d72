"""A draft bundle beside the eager model: the same program, in half precision still the same."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from edgeprune.bundle import ParityRecord
from edgeprune.export import parity, precision
from edgeprune.export.dialogue import Graphs
from edgeprune.graphs import GraphRecord
from edgeprune.models import Adapter
from edgeprune.models._processor import Prompt
from edgeprune.models._reference import Reference
from edgeprune.policies import Policy
from edgeprune.progress import Progress
from edgeprune.spec import Plan


def compare(
    draft: Path,
    record: GraphRecord,
    adapter: Adapter,
    policy: Policy,
    plan: Plan,
    dtype: torch.dtype,
    wide: Collection[str],
    samples: Sequence[Prompt],
    report: Progress,
) -> ParityRecord:
    """Compare a draft, `record` its decoder's, with the eager model, whose parts `wide` compute in
    float32; ParityError where it is not the same."""
    report("load the eager reference", 0, 1)
    reference = Reference.build(adapter, policy, plan)

    def compared(done: int) -> None:
        report("parity", done, len(samples))

    if dtype == torch.float32:
        exported = Graphs(draft, record, reference.decoder)
        return parity.check(exported, reference, samples, compared)
    half = Reference.build(adapter, policy, plan, dtype)
    half.widen(wide)
    runs = dtype in precision.RUNS
    rounded = Graphs(draft, record, half.decoder, dtype) if runs else None
    eager, graph = precision.measure(rounded, reference, half, samples, compared)
    del half, rounded
    checked = parity.check_copy(draft, record, reference, dtype, samples, compared)
    return replace(checked, eager=eager, graph=graph)
