"""Work on a Ray cluster: results and failures come back as jobs end.

A job is a plain value; what does it is a function of an installed module, so every machine needs
the same edgeprune. Results come back through Ray: no folder has to be shared for them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from edgeprune.errors import BackendError, SpecError, brief, told

RETRIES = 1
"""How often a job whose worker died is begun again, on another one."""
Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster: its address, or `auto` for the one that runs on this machine."""

    address: str
    at_once: int | None = None  # jobs at most; None: one for each of the cluster's cores

    def __post_init__(self) -> None:
        if not self.address:
            raise SpecError("--ray is the address of a cluster, as 10.0.0.1:6379, or auto")

    def each(
        self, jobs: Sequence[Job], work: Callable[[Job], Result], *, gpus: int = 0
    ) -> Iterator[tuple[Job, Result | None, str]]:
        """Every job with its result, or with why it failed, as they end.

        A job has one core and `gpus` GPUs. Paths that are relative are so to this process's folder,
        where a worker's machine has it too.
        """
        if not jobs:
            return
        import ray

        self._connect(ray)
        try:
            task = ray.remote(_do).options(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)
            waiting, running = list(range(len(jobs)))[::-1], dict[Any, int]()
            while waiting or running:
                while waiting and (self.at_once is None or len(running) < self.at_once):
                    number = waiting.pop()
                    running[task.remote(work, jobs[number], str(Path.cwd()))] = number
                (ended, *_), _ = ray.wait(list(running))
                yield jobs[running.pop(ended)], *_outcome(ray, ended)
        finally:
            ray.shutdown()

    def _connect(self, ray: Any) -> None:
        try:
            ray.init(address=self.address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            raise BackendError(
                f"no Ray cluster answers at {self.address} ({brief(error)}); start one with"
                " ray start --head, and join it with ray start --address"
            ) from error


def _do(work: Callable[[Any], Any], job: Any, folder: str) -> tuple[Any, str]:
    """What a worker does: the result, or why there is none."""
    with suppress(OSError):
        os.chdir(folder)
    try:
        return work(job), ""
    except Exception as error:  # whatever it is, the other jobs go on
        return None, told(error)


def _outcome(ray: Any, ended: Any) -> tuple[Any, str]:
    try:
        result, why = ray.get(ended)
    except ray.exceptions.RayError as error:
        return None, f"Ray gave no result in {RETRIES + 1} tries ({told(error)})"
    return result, why
