"""Work in several processes, one for each core: results and progress come back as they are made.

Processes are spawned, so that no thread pool of an engine is copied. They end with their parent,
however that ends, and a SIGTERM lets them clean up behind themselves.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from edgeprune.errors import told

DEBUG = "EDGEPRUNE_DEBUG"
Job = TypeVar("Job")
Work = Callable[[Job, Callable[[int], None]], None]
"""Does one job, telling how much it has done; what it makes it leaves on disk."""


def each(
    jobs: Sequence[Job],
    work: Work[Job],
    processes: int,
    tick: Callable[[int], None] = lambda done: None,
) -> Generator[tuple[Job, str], None, None]:
    """Every job with why it failed, an empty text where it did not, as they end.

    `tick` is called with what the jobs report. One process, or one job, needs no other process.
    """
    if min(processes, len(jobs)) <= 1:
        for job in jobs:
            yield job, _outcome(work, job, tick)
        return
    context = multiprocessing.get_context("spawn")
    waiting: Any = context.Queue()
    events: Any = context.Queue()
    for number in range(len(jobs)):
        waiting.put(number)
    staff: list[BaseProcess] = []
    try:
        for _ in range(min(processes, len(jobs))):
            waiting.put(None)  # the end, once for each process
            serving = context.Process(
                target=_serve, args=(jobs, work, waiting, events), daemon=True
            )
            serving.start()
            staff.append(serving)
        yield from _listen(jobs, events, staff, tick)
    except BaseException:  # interrupted, or nobody listens any more
        for process in staff:
            process.terminate()
        raise
    finally:
        for process in staff:
            process.join(10)
            if process.is_alive():
                process.kill()


def _listen(
    jobs: Sequence[Job], events: Any, staff: Sequence[BaseProcess], tick: Callable[[int], None]
) -> Iterator[tuple[Job, str]]:
    """Pass on what the processes report, until every job has ended or no process is left."""
    open_jobs = set(range(len(jobs)))
    while open_jobs:
        alive = any(process.is_alive() for process in staff)
        try:
            number, news = events.get(timeout=0.5)
        except queue.Empty:
            if alive:
                continue
            for number in sorted(open_jobs):
                yield jobs[number], "its process was killed, perhaps for want of memory"
            return
        if isinstance(news, int):
            tick(news)
        else:
            open_jobs.discard(number)
            yield jobs[number], news


def _serve(jobs: Sequence[Job], work: Work[Job], waiting: Any, events: Any) -> None:
    """What a process does: jobs, until there are none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and tells us
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Thread(target=_follow_parent, daemon=True).start()
    try:
        while (number := waiting.get()) is not None:
            events.put((number, _outcome(work, jobs[number], partial(_report, events, number))))
    except KeyboardInterrupt:
        events.cancel_join_thread()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _report(events: Any, number: int, done: int) -> None:
    events.put((number, done))


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _outcome(work: Work[Job], job: Job, tick: Callable[[int], None]) -> str:
    try:
        work(job, tick)
    except Exception as error:  # whatever it is, the other jobs go on
        if os.environ.get(DEBUG):
            traceback.print_exc()
        return told(error)
    return ""
