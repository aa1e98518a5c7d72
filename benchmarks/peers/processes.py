"""A process for each graph, which times rounds."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.peers.job import LLAMA, Job
from benchmarks.peers.llama import PYTHON
from benchmarks.peers.rounds import RoundTimes, serve
from benchmarks.peers.runners import Ours, Peer


class GraphProcess:
    """A process that holds one graph and times a round when told; it may be opened many times."""

    def __init__(self, folder: Path, cache: str | None, threads: int | None) -> None:
        self.arguments = (folder, cache, threads)

    def open(self) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        self._start(theirs)
        theirs.close()
        self.pipe.recv()  # loaded

    def close(self) -> None:
        self.pipe.close()
        self._wait()

    def time_round(self, job: Job) -> RoundTimes:
        self.pipe.send(job)
        times: RoundTimes = self.pipe.recv()
        return times

    def _start(self, theirs: Connection) -> None:
        context, arguments = multiprocessing.get_context("spawn"), (theirs, *self.arguments)
        process = context.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        self._wait = process.join


class LlamaProcess(GraphProcess):
    """The same in the environment that llama.cpp is installed in."""

    def _start(self, theirs: Connection) -> None:
        folder, _, threads = self.arguments
        python = (folder / PYTHON).read_text().strip()
        given = str(folder), str(threads or os.cpu_count()), str(theirs.fileno())
        command = [python, "-m", "benchmarks.peers.llama", *given]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        self._wait = process.wait


def process_of(name: str, folder: Path, cache: str | None, threads: int | None) -> GraphProcess:
    """The process of a peer."""
    return (LlamaProcess if name == LLAMA else GraphProcess)(folder, cache, threads)


def _serve(pipe: Connection, folder: Path, cache: str | None, threads: int | None) -> None:
    serve(pipe, Peer(folder, cache, threads) if cache else Ours(folder, threads))
