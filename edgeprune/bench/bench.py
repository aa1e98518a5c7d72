"""`bench`: bundles timed side by side in one run, in rounds, beside what counting allows.

In every round each bundle runs vision, prefill and some decode steps once on each backend, so a
machine whose speed drifts slows them all; ratios are taken within a round, to the first bundle on
the same backend. Each bundle runs in a process of its own for each backend
(`worker`), all of them loaded throughout. What cannot run here is listed with the reason.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from edgeprune import cost, errors
from edgeprune.bench import agreement, worker
from edgeprune.bench.agreement import Agreement, Answer
from edgeprune.bench.conditions import Conditions, Observer, machine_versions
from edgeprune.bench.sustained import Sustained
from edgeprune.bundle import Bundle
from edgeprune.errors import BackendError, SpecError
from edgeprune.graph_contract import WEIGHTS
from edgeprune.lowering import DTYPES
from edgeprune.progress import Progress, silent
from edgeprune.records import Between, Bytes, Ratio, build, parse
from edgeprune.runtime import backends


@dataclass(frozen=True)
class BenchRequest:
    """What to time: text tokens beside the image's, decode steps in a round, rounds.

    With a `duration` in seconds there are as many rounds as begin within it.
    """

    bundles: tuple[Path, ...]
    backends: tuple[str, ...] = ("ort-cpu",)
    text_tokens: int = 64
    new_tokens: int = 32
    rounds: int = 10
    duration: float | None = None  # under load, in place of `rounds`
    warmup: int = 2  # rounds before those that count
    threads: int | None = None
    ratios: tuple[float, ...] = ()  # at which bundles with several are timed; none: the default

    def __post_init__(self) -> None:
        least = {"text_tokens": worker.PREFIX + 1, "new_tokens": 1, "rounds": 1, "warmup": 0}
        for name, number in least.items():
            if (found := getattr(self, name)) < number:
                raise SpecError(f"--{name.replace('_', '-')} is at least {number}; got {found}")
        if self.duration is not None and not 0 < self.duration < 1e6:
            raise SpecError(f"--duration is a number of seconds above 0; got {self.duration:g}")
        for backend in self.backends:
            backends.find(backend)


Seconds = Annotated[float, Between(0, 1e9)]
Operations = Annotated[int, Between(1, 1 << 62)]


@dataclass(frozen=True)
class RoundSeconds:
    """Seconds of each counted round; decode is per token."""

    vision: tuple[Seconds, ...]
    prefill: tuple[Seconds, ...]
    decode: tuple[Seconds, ...]

    def __post_init__(self) -> None:
        if not len(self.vision) == len(self.prefill) == len(self.decode) > 0:
            raise ValueError("a bundle's rounds lack a part")
        if min(*self.prefill, *self.decode) <= 0:
            raise ValueError("a bundle's prefill or decode takes no time")


@dataclass(frozen=True)
class Row:
    """One bundle's rounds on one backend, and what counting says of it."""

    name: str
    backend: str
    method: str
    cr: Ratio
    encoder: str  # what shortens it, as --encoder takes it
    dtype: str
    weights: str  # how those of products are stored, as --weights takes it
    weight_bytes: Bytes  # of all weights, in the bundle
    rounds: RoundSeconds
    load_seconds: Seconds
    build_seconds: Seconds | None  # of engines; None where nothing is built
    kv_bytes: Bytes  # of the caches as reserved, prefill and answer
    peak_bytes: Bytes | None  # of the process, or on a GPU of what it holds for the bundle
    joules: tuple[Annotated[float, Between(0, 1e12)], ...] | None  # of each round; None where the
    # machine measures no power
    meter: str  # where power is from
    encoder_operations: Operations
    prefill_operations: Operations
    decode_operations: Operations
    predicted: Annotated[float, Between(0, 1e9)] | None = (
        None  # milliseconds of vision and prefill,
    )
    # by the profile that the bundle was made with

    @property
    def first_token(self) -> float:
        """Median seconds of vision and prefill together."""
        rounds = zip(self.rounds.vision, self.rounds.prefill, strict=True)
        return statistics.median(vision + prefill for vision, prefill in rounds)


@dataclass(frozen=True)
class Absent:
    """A bundle on a backend that cannot run here, and why."""

    name: str
    backend: str
    why: str


@dataclass(frozen=True)
class BenchResult:
    rows: tuple[Row, ...]
    absent: tuple[Absent, ...]
    agreements: tuple[Agreement, ...]  # of each bundle's backends with its first
    request: dict[str, Any]
    machine: dict[str, str]
    sustained: Sustained | None = None  # of a bench with a duration

    def __post_init__(self) -> None:
        if len({len(row.rounds.prefill) for row in self.rows}) > 1:
            raise ValueError("bundles were timed in different numbers of rounds")
        if any(type(self.request.get(name)) is not int for name in ("text_tokens", "new_tokens")):
            raise ValueError("the request does not say how many tokens were read and written")
        timed = {len(row.rounds.prefill) for row in self.rows}
        if self.sustained is not None and timed != {len(self.sustained.seconds)}:
            raise ValueError("rounds under load and rounds that were timed differ in number")

    @classmethod
    def from_json(cls, text: str) -> BenchResult:
        """ValueError or TypeError where the text is not what `to_json` writes."""
        found: BenchResult = build(cls, parse(text), "bench")
        return found

    def to_json(self) -> str:
        """One line, for programs."""
        return json.dumps(asdict(self))


def bench(request: BenchRequest, report: Progress = silent) -> BenchResult:
    """Time every bundle on every backend, interleaved; the first is what ratios are taken to."""
    timed = list(_timed(request))
    with ExitStack() as stack:
        started = [
            stack.enter_context(_WorkerProcess(path, backend, request, cr))
            for backend in request.backends
            for path, cr in timed
        ]
        workers, absent = _loaded(started)
        agreements = tuple(_agreements(workers)) if len(request.backends) > 1 else ()
        sustained = _time(request, workers, report)
        rows = tuple(process.row() for process in workers)
    plain = asdict(request) | {"bundles": [path.name for path in request.bundles]}
    return BenchResult(rows, absent, agreements, plain, machine_versions(), sustained)


def _time(
    request: BenchRequest, workers: Sequence[_WorkerProcess], report: Progress
) -> Sustained | None:
    """All rounds: so many, or as many as begin within the duration."""
    for number in range(request.warmup):
        _round(workers, keep=False)
        report("warm-up", number + 1, request.warmup)
    if request.duration is None:
        for number in range(request.rounds):
            _round(workers, keep=True)
            report("rounds", number + 1, request.rounds)
        return None
    observer = Observer(gpu=any(backends.find(process.backend).gpu for process in workers))
    seconds, conditions, begun = list[float](), list[Conditions](), time.monotonic()
    while not seconds or seconds[-1] < request.duration:
        _round(workers, keep=True)
        seconds.append(time.monotonic() - begun)
        conditions.append(observer.look())
        report("seconds", min(int(seconds[-1]), int(request.duration)), int(request.duration))
    return Sustained(tuple(seconds), tuple(conditions))


def _round(workers: Sequence[_WorkerProcess], *, keep: bool) -> None:
    for process in workers:
        process.time_round(keep)


def _timed(request: BenchRequest) -> Iterator[tuple[Path, float | None]]:
    """Every bundle; one with several ratios at each that is asked for."""
    manifests = {path: Bundle.open(path, verify=False).manifest for path in request.bundles}
    if request.ratios and not any(manifest.ratios for manifest in manifests.values()):
        raise SpecError("--cr is for bundles with several ratios, none of these has; leave it out")
    for path in request.bundles:
        several = request.ratios if manifests[path].ratios else ()
        for cr in several or (None,):
            manifests[path].at(cr)  # refused before anything is opened
            yield path, cr


def _loaded(started: Sequence[_WorkerProcess]) -> tuple[list[_WorkerProcess], tuple[Absent, ...]]:
    """Those that can run; BackendError where none can, or where only one backend was asked for."""
    workers, absent = list[_WorkerProcess](), list[Absent]()
    for process in started:
        try:
            process.load()
        except BackendError as error:
            absent.append(Absent(process.manifest.label, process.backend, str(error)))
        else:
            workers.append(process)
    if absent and (not workers or len({process.backend for process in started}) == 1):
        raise BackendError("; ".join(dict.fromkeys(one.why for one in absent)))
    return workers, tuple(absent)


def _agreements(workers: Sequence[_WorkerProcess]) -> list[Agreement]:
    """Each bundle on its further backends against the first that runs it."""
    found, first = [], dict[tuple[Path, float | None], tuple[str, Answer]]()
    for process in workers:
        answer = process.answer()
        against, theirs = first.setdefault((process.path, process.cr), (process.backend, answer))
        if against != process.backend:
            name = process.manifest.label
            found.append(agreement.compare(name, process.backend, answer, against, theirs))
    return found


class _WorkerProcess:
    """The process of a bundle on a backend, and the rounds that it has run."""

    def __init__(
        self, path: Path, backend: str, request: BenchRequest, cr: float | None = None
    ) -> None:
        self.path, self.cr, self.backend, self.request = path, cr, backend, request
        self.manifest = Bundle.open(path, verify=False).manifest.at(cr)
        self.rounds: list[dict[str, Any]] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", worker.__name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the parent, which then ends its children
        )

    def load(self) -> None:
        """Have the process open its bundle."""
        request = self.request
        started = {
            "path": str(self.path),
            "backend": self.backend,
            "text_tokens": request.text_tokens,
            "new_tokens": request.new_tokens,
            "threads": None if backends.find(self.backend).gpu else request.threads,
            "cr": self.cr,
        }
        self.loaded = self._ask(json.dumps(started))

    def __enter__(self) -> _WorkerProcess:
        return self

    def __exit__(self, *raised: object) -> None:
        self.process.kill()
        self.process.communicate()

    def time_round(self, keep: bool) -> None:
        timed = self._ask("round")
        if keep:
            self.rounds.append(timed)

    def answer(self) -> Answer:
        return Answer(**self._ask("answer"))

    def _ask(self, line: str) -> dict[str, Any]:
        """One line to the process, one line back; its errors are raised here."""
        assert self.process.stdin and self.process.stdout  # both are pipes
        answer = ""
        with suppress(BrokenPipeError):
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        if not answer:
            raise BackendError(
                f"the process that ran {self.manifest.label} ended with code"
                f" {self.process.wait()}; where memory is short, bench fewer bundles at once"
            )
        found: dict[str, Any] = json.loads(answer)
        if "error" in found:
            raise getattr(errors, found["error"])(found["message"])
        return found

    def row(self) -> Row:
        record, prune, text = self.manifest.decoder, self.manifest.prune, self.request.text_tokens
        timing = self.manifest.timing
        if timing and (timing.backend, timing.text_tokens) != (self.backend, text):
            timing = None  # it predicts something else
        new, element = self.request.new_tokens, DTYPES[self.manifest.dtype].bytes
        vision, prefill, decode = zip(*(one["seconds"] for one in self.rounds), strict=True)
        peaks = [one["peak_bytes"] for one in self.rounds if one["peak_bytes"] is not None]
        return Row(
            name=self.manifest.label,
            backend=self.backend,
            method=prune.method,
            cr=prune.cr_reached,
            encoder=self.manifest.encoder.method,
            dtype=self.manifest.dtype,
            weights=self.manifest.weights.format if self.manifest.weights else "float",
            weight_bytes=self.manifest.files[WEIGHTS].bytes,
            rounds=RoundSeconds(vision, prefill, decode),
            load_seconds=self.loaded["load_seconds"],
            build_seconds=self.loaded["build_seconds"],
            kv_bytes=cost.kv_bytes(record, prune.counts, text + new, element),
            peak_bytes=max(peaks, default=None),
            joules=_joules(self.rounds, new),
            meter=self.loaded["meter"],
            encoder_operations=self.manifest.encoder.operations,
            prefill_operations=cost.prefill_operations(record, prune.counts, text),
            decode_operations=cost.decode_operations(record, prune.counts, text + new // 2),
            predicted=timing.vision + timing.prefill if timing else None,
        )


def _joules(rounds: Sequence[dict[str, Any]], new_tokens: int) -> tuple[float, ...] | None:
    """Of each round: an image, a prompt and `new_tokens` decode steps."""
    if any(one["watts"] is None for one in rounds):
        return None
    whole = ((one["watts"], *one["seconds"]) for one in rounds)
    return tuple(w * (vision + prefill + new_tokens * step) for w, vision, prefill, step in whole)
