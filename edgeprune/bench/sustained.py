"""A machine under load for minutes: speed, heat and clocks in each part of the time."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated

from edgeprune.bench.conditions import Conditions
from edgeprune.records import Between
from edgeprune.tables import plain, spread

if TYPE_CHECKING:
    from edgeprune.bench.bench import BenchResult, Row

PARTS = 10
"""Of the time, that are compared."""
HEADS = (
    "seconds",
    "bundle",
    "backend",
    "rounds",
    "TTFT ms",
    "decode ms/token",
    "requests/min",
    "W",
    "C",
    "CPU MHz",
    "GPU MHz",
    "slowed",
)


@dataclass(frozen=True, slots=True)
class Sustained:
    """When each counted round ended, in seconds since the first began, and how the machine was."""

    seconds: tuple[Annotated[float, Between(0, 1e9)], ...]
    conditions: tuple[Conditions, ...]

    def __post_init__(self) -> None:
        if len(self.seconds) != len(self.conditions) or not self.seconds:
            raise ValueError("rounds under load lack a time or a look at the machine")
        if any(a > b for a, b in pairwise(self.seconds)):
            raise ValueError("rounds under load end one after another")

    def parts(self) -> list[range]:
        """Rounds of equal parts of the time; a part in which none ended is left out."""
        whole = self.seconds[-1] or 1.0
        numbers = [min(PARTS - 1, int(PARTS * s / whole)) for s in self.seconds]
        edges = [i for i, n in enumerate(numbers) if i == 0 or n != numbers[i - 1]]
        return [range(a, b) for a, b in pairwise([*edges, len(numbers)])]


def table(result: BenchResult) -> str:
    """A row for each part of the time and bundle, and a line on what the last lost to the first."""
    assert result.sustained is not None
    lines = [HEADS, *_rows(result, result.sustained)]
    verdicts = [_verdict(row, result.sustained.parts()) for row in result.rows]
    return "\n".join([plain(lines, left=3), *verdicts, _slowed(result.sustained.conditions)])


def _rows(result: BenchResult, sustained: Sustained) -> Iterator[tuple[str, ...]]:
    steps, ends = int(result.request["new_tokens"]), (0.0, *sustained.seconds)
    for part in sustained.parts():
        known = [sustained.conditions[i] for i in part]
        for row in result.rows:
            took = [_whole(row, i, steps) for i in part]
            yield (
                f"{ends[part[0]]:.0f}-{ends[part[-1] + 1]:.0f}",
                row.name,
                row.backend,
                str(len(part)),
                spread([1e3 * _first_token(row, i) for i in part]),
                spread([1e3 * row.rounds.decode[i] for i in part]),
                f"{60 / statistics.fmean(took):.1f}",
                "-"
                if row.joules is None
                else f"{sum(row.joules[i] for i in part) / sum(took):.1f}",
                _highest([one.celsius for one in known]),
                _mean([one.cpu_mhz for one in known]),
                _mean([one.gpu_mhz for one in known]),
                f"{statistics.fmean(bool(one.slowed) for one in known):.0%}",
            )


def _verdict(row: Row, parts: Sequence[range]) -> str:
    first, last = parts[0], parts[-1]
    token, step = (
        statistics.median(of(row, i) for i in last) / statistics.median(of(row, i) for i in first)
        for of in (_first_token, lambda row, i: row.rounds.decode[i])
    )
    return (
        f"{row.name} on {row.backend}: in the last part the first token took {token:.2f} times and"
        f" a step of decode {step:.2f} times what they took in the first"
    )


def _slowed(conditions: Sequence[Conditions]) -> str:
    causes = sorted({cause for one in conditions for cause in one.slowed})
    if causes:
        share = statistics.fmean(bool(one.slowed) for one in conditions)
        return f"slowed down in {share:.0%} of the rounds: {', '.join(causes)}"
    return "the machine reported no slowdown; where it tells no clocks, compare the parts above"


def _first_token(row: Row, index: int) -> float:
    return row.rounds.vision[index] + row.rounds.prefill[index]


def _whole(row: Row, index: int, steps: int) -> float:
    """Seconds of a round: an image, a prompt, and so many steps."""
    return _first_token(row, index) + steps * row.rounds.decode[index]


def _highest(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{max(known):.0f}" if known else "-"


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known):.0f}" if known else "-"
