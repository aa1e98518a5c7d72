"""All bundles timed in one run on one prompt: in every round each runs once."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeprune.bench.bench import BenchRequest, bench
from edgeprune.compare.store import key_of
from edgeprune.errors import SpecError
from edgeprune.progress import Progress, silent
from edgeprune.versions import installed


@dataclass(frozen=True)
class TimingRequest:
    """How bundles are timed: on which engine, with how many rounds and decode steps a round."""

    backend: str = "ort-cpu"
    rounds: int = 20
    new_tokens: int = 16
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise SpecError(f"--rounds is at least 1, or 0 for no times; got {self.rounds}")

    def key(self, bundles: Sequence[str], text_tokens: int) -> str:
        """Names a timing by all that decides its times and can be known."""
        versions = [installed(name) for name in ("edgeprune", "onnxruntime")]
        return key_of(bundles, text_tokens, versions, platform.uname(), asdict(self))

    def run(
        self,
        bundles: Sequence[Path],
        text_tokens: int,
        report: Progress = silent,
    ) -> dict[str, Any]:
        """Milliseconds of every round by bundle's name and part; decode per token.

        Each bundle has a process of its own, all of them loaded throughout: in one process, the
        session opened first would decode a tenth slower than the others, whichever graph it holds.
        """
        request = BenchRequest(
            tuple(bundles),
            (self.backend,),
            text_tokens=text_tokens,
            new_tokens=self.new_tokens,
            rounds=self.rounds,
            threads=self.threads,
        )
        result = bench(request, report)
        rounds = {
            path.name: {
                part: _milliseconds(seconds) for part, seconds in asdict(row.rounds).items()
            }
            for path, row in zip(bundles, result.rows, strict=True)
        }
        return {"rounds": rounds, "machine": result.machine}


def _milliseconds(seconds: Sequence[float]) -> list[float]:
    return [round(1e3 * second, 4) for second in seconds]
