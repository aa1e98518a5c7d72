"""Rounds of one model, in a process of its own; needs numpy only, for peers' environments too."""

from __future__ import annotations

import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Protocol

from benchmarks.peers.job import Array, Job


class Runner(Protocol):
    """One model; `begin` may take its time, `prefill` and `decode` are on the clock."""

    def begin(self, job: Job) -> None: ...
    def prefill(self) -> None: ...
    def decode(self, token: int) -> None: ...
    def logits(self) -> Array:
        """Those of the last token."""
        ...


@dataclass(frozen=True)
class RoundTimes:
    """Seconds of a prefill and per decoded token, and the logits of every call."""

    prefill: float
    decode: float
    logits: tuple[Array, ...]


def time_round(runner: Runner, job: Job) -> RoundTimes:
    """One prefill and its decode steps."""
    clock = time.perf_counter
    runner.begin(job)
    begun = clock()
    runner.prefill()
    prefill, decode = clock() - begun, 0.0
    logits = [runner.logits()]
    for token in job.following:
        begun = clock()
        runner.decode(int(token))
        decode += clock() - begun
        logits.append(runner.logits())
    return RoundTimes(prefill, decode / len(job.following), tuple(logits))


def serve(pipe: Connection, runner: Runner) -> None:
    """Time a round for each job until the other end is closed."""
    pipe.send(None)  # loaded
    while True:
        try:
            job = pipe.recv()
        except EOFError:  # all rounds are done
            return
        pipe.send(time_round(runner, job))
