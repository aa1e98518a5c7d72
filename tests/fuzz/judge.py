"""Inputs go to workers, whose time and memory are watched; what comes back is judged."""

from __future__ import annotations

import multiprocessing
import queue
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.fuzz.worker import LOADED, MEMORY, Made, Seen, clock, serve

SECONDS = 10.0
LINE = re.compile(r"edgeprune: [^\n]+\n")
ANSWERED = re.compile(r"^\S+ \(ort-cpu\)\n(    .*\n)+")
"""What `run` says of a first answer, before it refuses the next question."""
LIFE = 200
"""Inputs after which a worker is replaced, so that each is judged by itself."""

Input = tuple[str, int]  # kind, number


@dataclass(frozen=True)
class Verdict:
    """What became of one input; `wrong` is empty where it was right."""

    kind: str
    number: int
    made: Made
    seen: Seen | None  # None: the worker died or was stopped
    wrong: str

    @property
    def outcome(self) -> str:
        """`taken`, or the function that refused it."""
        if self.seen is None:
            return "worker lost"
        return "taken" if self.seen.code == 0 else self.seen.where or "command line"


class Judge:
    """Runs inputs in worker processes under a limit of time and of memory."""

    def __init__(
        self, seeds: Path, seed: int, keep: Path | None = None, seconds: float = SECONDS
    ) -> None:
        self.seeds, self.seed, self.keep, self.seconds = seeds, seed, keep, seconds

    def run(
        self, inputs: Iterable[Input], workers: int = 1, tell: Callable[[Verdict], None] = print
    ) -> list[Verdict]:
        """All verdicts, in the order of their inputs."""
        waiting: queue.SimpleQueue[Input] = queue.SimpleQueue()
        for one in (ordered := list(inputs)):
            waiting.put(one)
        found: dict[Input, Verdict] = {}
        failed: list[Exception] = []

        def work() -> None:
            worker = _Worker(self)
            while True:
                try:
                    one = waiting.get_nowait()
                except queue.Empty:
                    return worker.stop()
                try:
                    verdict = worker.judge(one)
                    if verdict.wrong.startswith("more than"):  # the machine may have been busy
                        verdict = worker.judge(one)
                except Exception as error:
                    failed.append(error)
                    return worker.stop(kill=True)
                found[one] = verdict
                tell(verdict)

        threads = [threading.Thread(target=work) for _ in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]
        return [found[one] for one in ordered]


class _Worker:
    """One process, replaced when it is lost, old or large."""

    def __init__(self, judge: Judge) -> None:
        self.owner, self.served = judge, LIFE
        self.process: BaseProcess | None = None

    def judge(self, one: Input) -> Verdict:
        if self.served >= LIFE or self.process is None:
            self._replace()
        self.served += 1
        self.line.send(one)
        made = self._receive(300, Made)
        if not isinstance(made, Made):
            raise RuntimeError(f"input {one} was not made: {made}")
        seen = self._receive(self.owner.seconds, Seen)
        if isinstance(seen, Seen):
            return Verdict(*one, made, seen, fault(seen))
        return Verdict(*one, made, None, seen)

    def _receive(self, seconds: float, kind: type) -> Made | Seen | str:
        """What the worker sends, or in words why it is lost."""
        assert self.process is not None
        why = f"more than {seconds:g} s"
        began = clock(self.process.pid)
        while True:
            try:
                if clock(self.process.pid) - began > seconds:
                    break
                if self.line.poll(0.02):
                    received: Made | Seen = self.line.recv()
                    return received
                if kind is Seen and _resident(self.process.pid) > MEMORY:
                    why = f"more than {MEMORY:,} bytes of memory"
                    break
            except (EOFError, OSError):
                self.process.join(60)
                why = f"the process died with exit code {self.process.exitcode}"
                break
        self.stop(kill=True)
        return why

    def _replace(self) -> None:
        self.stop()
        context = multiprocessing.get_context("forkserver")  # which loads libraries once
        context.set_forkserver_preload([*LOADED, serve.__module__])
        self.line, theirs = context.Pipe()
        owner = self.owner
        self.process = context.Process(
            target=serve, args=(theirs, owner.seeds, owner.seed, owner.keep), daemon=True
        )
        self.process.start()
        theirs.close()
        self.served = 0

    def stop(self, kill: bool = False) -> None:
        if self.process is None:
            return
        if kill:
            self.process.kill()
        else:
            self.line.send(None)
        self.process.join(20)
        self.process = None


def fault(seen: Seen) -> str:
    """What is wrong with how a command ended; empty where nothing is."""
    if seen.trace:
        return f"a traceback: {seen.trace.strip().splitlines()[-1][:200]}"
    if "Traceback" in seen.error:
        return "a traceback on stderr"
    if seen.faults:
        return "; ".join(dict.fromkeys(seen.faults))
    if seen.peak > MEMORY:
        return f"more than {MEMORY:,} bytes of memory: {seen.peak:,}"
    if seen.code not in (0, 2):
        return f"exit code {seen.code}"
    if any(not (letter.isprintable() or letter in "\n\t") for letter in seen.error):
        return f"control characters on stderr: {seen.error[:200]!r}"
    if seen.code == 2 and not LINE.fullmatch(ANSWERED.sub("", seen.error)):
        return f"no single line on stderr: {seen.error[:400]!r}"
    return ""


def _resident(process: int | None) -> int:
    try:
        pages = Path(f"/proc/{process}/statm").read_text().split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * 4096
