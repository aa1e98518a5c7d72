"""What the server counts, as text in the format of Prometheus."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from edgeprune.memory import resident_bytes
from edgeprune.serve.model import Finished, ServedBundle

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the histograms' buckets."""

Labels = tuple[tuple[str, str], ...]


@dataclass
class Counter:
    """A number that grows, for each set of labels."""

    name: str
    help: str
    values: dict[Labels, float] = field(default_factory=dict)

    def add(self, amount: float = 1, **labels: str) -> None:
        key = tuple(labels.items())
        self.values[key] = self.values.get(key, 0) + amount

    def lines(self) -> Iterable[str]:
        yield from _head(self.name, self.help, "counter")
        for labels, value in self.values.items():
            yield _line(self.name, labels, value)


@dataclass
class Histogram:
    """How often a time was up to each bound, for each model."""

    name: str
    help: str
    values: dict[Labels, list[float]] = field(default_factory=dict)  # buckets, then the sum

    def observe(self, seconds: float, **labels: str) -> None:
        counts = self.values.setdefault(tuple(labels.items()), [0.0] * (len(SECONDS) + 2))
        counts[bisect_left(SECONDS, seconds)] += 1
        counts[-1] += seconds

    def lines(self) -> Iterable[str]:
        yield from _head(self.name, self.help, "histogram")
        for labels, (*counts, total) in self.values.items():
            reached = 0.0
            for bound, count in zip((*SECONDS, "+Inf"), counts, strict=True):
                reached += count
                yield _line(f"{self.name}_bucket", (*labels, ("le", str(bound))), reached)
            yield _line(f"{self.name}_sum", labels, total)
            yield _line(f"{self.name}_count", labels, reached)


class Metrics:
    """All that is counted since the start; any thread may add to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests = Counter("edgeprune_requests_total", "Answered requests, by HTTP status")
        self._left = Counter("edgeprune_clients_left_total", "Requests whose client went away")
        self._first = Histogram(
            "edgeprune_time_to_first_token_seconds", "From the request to the first token"
        )
        self._next = Histogram(
            "edgeprune_time_per_output_token_seconds", "Per token after the first, of one answer"
        )
        self._tokens = Counter("edgeprune_tokens_total", "Tokens of prompts and answers")
        self._visual = Counter(
            "edgeprune_visual_tokens_total", "Visual tokens before pruning, and the mean layer's"
        )

    def request(self, model: str, status: int) -> None:
        """A request was answered."""
        with self._lock:
            self._requests.add(model=model, status=str(status))

    def client_left(self, model: str) -> None:
        """A client went away before its answer."""
        with self._lock:
            self._left.add(model=model)

    def answer(self, model: str, finished: Finished, first: float, whole: float) -> None:
        """An answer is complete: seconds to its first token and to its end."""
        usage = finished.usage
        with self._lock:
            self._first.observe(first, model=model)
            if usage.completion > 1:
                self._next.observe((whole - first) / (usage.completion - 1), model=model)
            self._tokens.add(usage.prompt, model=model, kind="prompt")
            self._tokens.add(usage.cached, model=model, kind="cached")
            self._tokens.add(usage.completion, model=model, kind="completion")
            if not usage.cached:
                mean = sum(usage.kept) / len(usage.kept)
                self._visual.add(usage.visual, model=model, kind="before")
                self._visual.add(mean, model=model, kind="kept")

    def text(self, bundles: Mapping[str, ServedBundle]) -> str:
        """All metrics, and what the bundles are doing now."""
        with self._lock:
            parts = (self._requests, self._left, self._first, self._next, self._tokens)
            lines = [line for part in (*parts, self._visual) for line in part.lines()]
        dialogues = Counter("edgeprune_dialogues_total", "What became of kept dialogues")
        waiting, running = dict[Labels, float](), dict[Labels, float]()
        for name, bundle in bundles.items():
            label = (("model", name),)
            waiting[label], running[label] = bundle.scheduler.waiting, bundle.scheduler.running
            for outcome in ("continued", "replayed", "evicted"):
                count = getattr(bundle.dialogues, outcome)
                dialogues.add(count, model=name, outcome=outcome)
        lines += dialogues.lines()
        lines += _gauge("edgeprune_queue_length", "Requests that wait", waiting)
        lines += _gauge("edgeprune_running", "Requests that are being answered", running)
        if (resident := resident_bytes()) is not None:
            lines += _gauge(
                "process_resident_memory_bytes", "Resident memory of the server", {(): resident}
            )
        return "\n".join(lines) + "\n"


def _gauge(name: str, told: str, values: Mapping[Labels, float]) -> list[str]:
    return [*_head(name, told, "gauge"), *(_line(name, at, value) for at, value in values.items())]


def _head(name: str, told: str, kind: str) -> Iterable[str]:
    yield f"# HELP {name} {told}"
    yield f"# TYPE {name} {kind}"


def _line(name: str, labels: Labels, value: float) -> str:
    shown = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels)
    return f"{name}{{{shown}}} {value:.12g}" if shown else f"{name} {value:.12g}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
