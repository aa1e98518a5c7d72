"""A process for each graph, and the rounds that it times."""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.peers.job import Array, Job
from benchmarks.peers.runners import Ours, Peer, Runner


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


class GraphProcess:
    """A process that holds one graph and times a round when job; it may be opened many times."""

    def __init__(self, folder: Path, cache: str | None, threads: int | None) -> None:
        self.arguments = (folder, cache, threads)

    def open(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        arguments = (theirs, *self.arguments)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.pipe.recv()  # loaded

    def close(self) -> None:
        self.pipe.close()
        self.process.join()

    def time_round(self, job: Job) -> RoundTimes:
        self.pipe.send(job)
        times: RoundTimes = self.pipe.recv()
        return times


def _serve(pipe: Connection, folder: Path, cache: str | None, threads: int | None) -> None:
    runner: Runner = Peer(folder, cache, threads) if cache else Ours(folder, threads)
    pipe.send(None)
    while True:
        try:
            job = pipe.recv()
        except EOFError:  # all rounds are done
            return
        pipe.send(time_round(runner, job))
