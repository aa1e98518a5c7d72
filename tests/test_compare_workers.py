"""Jobs in several processes: none is lost, a failure is told, a killed process too."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from edgeprune.compare.workers import each
from edgeprune.errors import SpecError


def work(job: int, tick: Callable[[int], None]) -> None:
    """Spawned processes import it by its name."""
    tick(job)
    if job == 3:
        raise SpecError("three is\nrefused")
    if job == 4:
        raise ZeroDivisionError("four")
    if job == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    if job == 10:
        tick(os.getpid())


@pytest.mark.parametrize("processes", [1, 2])
def test_every_job_ends_and_tells_why_it_failed(processes: int) -> None:
    ticks: list[int] = []
    found = dict(each([1, 2, 3, 4, 5], work, processes, ticks.append))
    assert found == {1: "", 2: "", 3: "three is refused", 4: "ZeroDivisionError: four", 5: ""}
    assert sorted(ticks) == [1, 2, 3, 4, 5]


def test_a_killed_process_is_told_and_the_other_goes_on() -> None:
    found = dict(each([9, 1, 2, 5], work, 2))
    assert found == {9: "its process was killed, perhaps for want of memory", 1: "", 2: "", 5: ""}


def test_one_process_is_this_one_and_no_job_needs_none() -> None:
    ticks: list[int] = []
    assert list(each([10], work, 8, ticks.append)) == [(10, "")]
    assert ticks == [10, os.getpid()]
    assert list(each([], work, 2)) == []


def test_who_leaves_early_leaves_no_process_behind() -> None:
    import multiprocessing

    jobs = each([1, 2, 5, 6, 7, 8], work, 2)
    next(jobs)
    jobs.close()
    assert multiprocessing.active_children() == []
