"""A process for each graph, opened as often as one likes, and laps on the clock."""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.peers.job import Array, Job
from benchmarks.peers.runners import Ours, Peer, Runner


@dataclass(frozen=True)
class Lap:
    """Seconds of a prefill and per decoded token, and the logits of every call."""

    prefill: float
    decode: float
    logits: tuple[Array, ...]


def lap(runner: Runner, job: Job) -> Lap:
    clock = time.perf_counter
    runner.begin(job)
    begun = clock()
    runner.prefill()
    prefill, decode = clock() - begun, 0.0
    found = [runner.logits()]
    for token in job.following:
        begun = clock()
        runner.decode(int(token))
        decode += clock() - begun
        found.append(runner.logits())
    return Lap(prefill, decode / len(job.following), tuple(found))


class Lane:
    """A process that holds one graph and runs a lap when told to; opened as often as one likes."""

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

    def lap(self, job: Job) -> Lap:
        self.pipe.send(job)
        found: Lap = self.pipe.recv()
        return found


def _serve(pipe: Connection, folder: Path, cache: str | None, threads: int | None) -> None:
    runner: Runner = Peer(folder, cache, threads) if cache else Ours(folder, threads)
    pipe.send(None)
    while True:
        try:
            asked = pipe.recv()
        except EOFError:  # the race is over
            return
        pipe.send(lap(runner, asked))
