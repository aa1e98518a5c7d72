"""Counts of a run, as a table in Markdown, and what was wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tests.fuzz.judge import Verdict


def table(verdicts: Sequence[Verdict]) -> str:
    """A row for each kind of input: how many, how far they came, the largest time and memory."""
    lines = [
        "| input | inputs | well-formed | taken | refused | wrong | slowest | most memory |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    kinds = sorted({verdict.kind for verdict in verdicts})
    lines += [_row(kind, [v for v in verdicts if v.kind == kind]) for kind in kinds]
    return "\n".join([*lines, _row("all", verdicts)])


def _row(name: str, verdicts: Sequence[Verdict]) -> str:
    ended = [v.seen for v in verdicts if v.seen is not None]
    wrong = sum(bool(v.wrong) for v in verdicts)
    taken = sum(v.outcome == "taken" and not v.wrong for v in verdicts)
    cells = [
        len(verdicts),
        sum(v.made.well_formed for v in verdicts),
        taken,
        len(verdicts) - taken - wrong,
        wrong,
        f"{max((seen.seconds for seen in ended), default=0):.1f} s",
        f"{max((seen.peak for seen in ended), default=0) / 1e9:.2f} GB",
    ]
    texts = [f"{cell:,}" if isinstance(cell, int) else cell for cell in cells]
    return f"| {name} | " + " | ".join(texts) + " |"


def reached(verdicts: Sequence[Verdict]) -> str:
    """For each kind, the functions that refused its inputs, the most frequent first."""
    lines = []
    for kind in sorted({verdict.kind for verdict in verdicts}):
        counts = Counter(v.outcome for v in verdicts if v.kind == kind)
        told = ", ".join(f"{name} {count}" for name, count in counts.most_common())
        lines.append(f"{kind}: {told}")
    return "\n".join(lines)


def wrongs(verdicts: Sequence[Verdict]) -> str:
    """A line for each wrong input: how to make it again, what was altered, what happened."""
    return "\n".join(f"{v.kind}:{v.number} [{v.made.note}] {v.wrong}" for v in verdicts if v.wrong)
