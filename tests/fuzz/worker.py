"""A process that makes inputs, runs their commands one after the other, and tells what it saw."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.fuzz.case import Case, make
from tests.fuzz.seeds import Seeds

STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect")
"""What Python audits of other programs and addresses."""
OURS = "edgeprune.bench.worker", "edgeprune.runtime.parsers"
"""The programs that commands start by themselves."""
MEMORY = 2_000_000_000
"""Bytes that a process may use."""
LOADED = ("torch", "transformers", "onnx", "onnxruntime", "tokenizers", "PIL.Image", "av")
"""What takes addresses without using memory: it is loaded before these are limited."""


@dataclass(frozen=True)
class Made:
    """An input is there; its command runs from now on."""

    note: str
    well_formed: bool


@dataclass(frozen=True)
class Seen:
    """How its command ended."""

    code: object  # the exit code, or None after an exception
    trace: str  # of an exception that came out of the command
    error: str  # what stood on stderr
    where: str  # the function that refused it
    seconds: float
    peak: int  # bytes of memory, at most
    faults: tuple[str, ...] = ()  # programs started, files opened, success where there may be none


@dataclass
class Watch:
    """What Python's audit hook and the base of our errors tell while a command runs."""

    where: str = ""
    started: list[str] = field(default_factory=list)
    opened: list[str] = field(default_factory=list)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in STARTS and not any(name in str(arguments[1:2]) for name in OURS):
            self.started.append(event)
        elif event == "open" and isinstance(arguments[0], (str, bytes)):
            self.opened.append(os.fsdecode(arguments[0]))

    def initialiser(self) -> Callable[..., None]:
        """Stands in for `__init__` of our errors, and notes the function that made the last one:
        of errors that are told again with more words, the function that made the first."""
        made: dict[BaseException | None, str] = {}

        def note(error: Exception, *arguments: object) -> None:
            Exception.__init__(error, *arguments)
            caller = sys._getframe(1).f_code
            here = f"{Path(caller.co_filename).stem}.{caller.co_name}"
            self.where = made.get(sys.exc_info()[1], here)
            made.clear()
            made[error] = self.where

        return note


def serve(connection: Connection, seeds: Path, seed: int, keep: Path | None) -> None:
    """Answer every (kind, number) with a Made and a Seen, until None comes."""
    from edgeprune.errors import EdgepruneError

    limit_memory()
    watch = Watch()
    sys.addaudithook(watch.audit)
    EdgepruneError.__init__ = watch.initialiser()  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        error = Path(scratch) / "stderr"
        for number, name in ((1, os.devnull), (2, str(error))):
            handle = os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            os.dup2(handle, number)
        while (asked := connection.recv()) is not None:
            folder = (keep or Path(scratch)) / "{}-{}".format(*asked)
            folder.mkdir(parents=True)
            os.chdir(folder)
            try:
                case = make(*asked, seed, Seeds(seeds), folder)
            except Exception:  # a fault of the generator
                connection.send(traceback.format_exc())
                continue
            connection.send(Made(case.note, case.well_formed))
            connection.send(_run(case, watch, error))
            os.chdir(scratch)
            if keep is None:
                shutil.rmtree(folder, ignore_errors=True)


def limit_memory() -> None:
    """Let allocations fail beyond MEMORY, as `ulimit -v` does that the documents tell of."""
    for name in LOADED:
        import_module(name)
    pages = [int(word) for word in Path("/proc/self/statm").read_text().split()]
    addresses, resident = (4096 * count for count in pages[:2])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (addresses + MEMORY - resident, hard))


def _run(case: Case, watch: Watch, error: Path) -> Seen:
    os.truncate(error, 0)
    watch.where, watch.started, watch.opened = "", [], []
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    began, trace, code = clock(), "", None
    try:
        code = case.run()
    except SystemExit as exit:
        code = exit.code
    except BaseException:  # panics of Rust are no Exception
        trace = traceback.format_exc()
    seconds = clock() - began
    sys.stdout.flush()
    sys.stderr.flush()
    faults = [f"started {event}" for event in watch.started]
    barred = {str(path) for path in case.forbidden}
    faults += [f"opened {path}" for path in watch.opened if path in barred]
    if case.refuse and code == 0:
        faults.append("took what has to be refused")
    said = error.read_bytes()[:100_000].decode(errors="replace")
    return Seen(code, trace, said, watch.where, seconds, peak(), tuple(faults))


def clock(process: int | str = "self") -> float:
    """Seconds, less those that a process has waited for a CPU that others keep busy."""
    waited = int(Path(f"/proc/{process}/schedstat").read_text().split()[1])
    return time.monotonic() - waited / 1e9


def peak(process: int | str = "self") -> int:
    """Bytes of memory that a process has had at most since its peak was cleared."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
