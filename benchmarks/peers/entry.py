"""A lane with a job."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.peers.job import Job
from benchmarks.peers.lanes import Lane


@dataclass
class Entry:
    """A lane with a job, and what its laps took."""

    name: str
    lane: Lane
    job: Job
    peer: bool = False
    pruned: bool = False  # its logits are its own
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    difference: float = 0.0

    def run(self) -> None:
        found = self.lane.lap(self.job)
        self.prefill.append(found.prefill)
        self.decode.append(found.decode)
