"""Calibration over a cluster: each job measures some of the samples; what they find is joined.

Samples are measured one by one in each layer, so the result for a sample does not depend on which
others its job measures.
A job reads the whole checkpoint once, so there are no more jobs than can run at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

from edgeprune import policies
from edgeprune.calib.calibrate import CalibrationRequest, check_room, samples_of
from edgeprune.calib.collect import collect
from edgeprune.calib.schedule import Evidence
from edgeprune.cluster import Cluster
from edgeprune.errors import ScheduleError
from edgeprune.models import open_model
from edgeprune.models._execution import HOST, Execution
from edgeprune.models._processor import Processor
from edgeprune.progress import Progress, silent
from edgeprune.spec import PruneSpec
from edgeprune.tiling import Size

JOBS = 4
"""Jobs where the caller does not say how many run at a time."""


@dataclass(frozen=True)
class Spread:
    """How a worker opens the model, and what it measures; as the arguments of `open_model`."""

    cluster: Cluster
    request: CalibrationRequest
    spec: PruneSpec
    model: str
    revision: str | None = None
    size: Size | None = None
    images: int = 1
    frames: int | None = None
    tiles: int | None = None
    tokenizer: Path | None = None
    execution: Execution = HOST

    def measure(self, report: Progress = silent) -> Evidence:
        """The evidence of all samples, in their order; ScheduleError where a part is missing."""
        total = self.request.samples
        parts = dict[range, tuple[Evidence, ...]]()
        jobs = ranges(total, self.cluster.at_once or JOBS)
        gpus = int(not self.execution.on_host)
        report("calibrate on Ray", 0, total)
        for part, found, why in self.cluster.each(jobs, partial(_measure, self), gpus=gpus):
            if found is None:
                raise ScheduleError(
                    f"samples {part.start + 1} to {part.stop} were not measured: {why}"
                )
            parts[part] = found
            report("calibrate on Ray", sum(map(len, parts)), total)
        return joined([found for part in jobs for found in parts[part]])


def ranges(total: int, parts: int) -> list[range]:
    """The numbers below `total` in so many ranges, whose lengths differ by at most 1."""
    parts = min(total, parts)
    ends = [round(total * i / parts) for i in range(parts + 1)]
    return [range(a, b) for a, b in pairwise(ends)]


def joined(parts: Sequence[Evidence]) -> Evidence:
    """One evidence from those of parts of the samples."""
    entries = [part.entry for part in parts if part.entry is not None]
    return Evidence(
        np.concatenate([part.attention for part in parts]),
        np.concatenate([part.loss for part in parts]),
        np.concatenate(entries) if entries else None,
        tuple(name for part in parts for name in part.sample_ids),
    )


def _measure(spread: Spread, part: range) -> tuple[Evidence, ...]:
    """What a worker does; nothing where a file has fewer samples than were asked for."""
    spread.execution.require()
    adapter = open_model(
        spread.model,
        spread.revision,
        size=spread.size,
        images=spread.images,
        frames=spread.frames,
        tiles=spread.tiles,
        tokenizer=spread.tokenizer,
    ).with_execution(spread.execution)
    check_room(adapter, len(part))
    policy, processor = policies.make(spread.spec), Processor(adapter)
    chosen = list(islice(samples_of(spread.request, adapter, processor), part.start, part.stop))
    return (collect(adapter, policy, chosen),) if chosen else ()
