"""A graph with its input and its times."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.peers.job import Job
from benchmarks.peers.processes import GraphProcess


@dataclass
class Entry:
    """A graph's process, its input, and the seconds that its rounds took."""

    name: str
    process: GraphProcess
    job: Job
    peer: bool = False
    pruned: bool = False  # its logits are its own
    int4: bool = False  # its logits are near those of floats
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    difference: float = 0.0

    def run(self) -> None:
        times = self.process.time_round(self.job)
        self.prefill.append(times.prefill)
        self.decode.append(times.decode)
