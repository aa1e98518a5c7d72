"""Tables as text, for a terminal and in Markdown, and what a cell says of repeated measurements."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Rows = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Table:
    """Rows of as many cells as there are heads; the caption says what they show."""

    caption: str
    heads: Sequence[str]
    rows: Rows

    def markdown(self) -> str:
        """The table alone, without its caption."""
        return markdown(self.heads, self.rows)


def plain(rows: Rows, left: int | None = None) -> str:
    """Rows of equally many cells, aligned; from column `left` on, if given, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = (
        [c.ljust(w) if left is None or i < left else c.rjust(w) for i, (c, w) in enumerate(cells)]
        for cells in (zip(row, widths, strict=True) for row in rows)
    )
    return "\n".join("  ".join(row).rstrip() for row in aligned)


def markdown(heads: Sequence[str], rows: Rows) -> str:
    """A table whose columns stand below each other in a terminal too."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    every = [heads, ["-" * width for width in widths], *rows]
    cells = ([c.ljust(w) for c, w in zip(row, widths, strict=True)] for row in every)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Median (tenth - ninetieth percentile), each in this format."""
    tenths = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values
    marks = tenths[0], statistics.median(values), tenths[-1]
    low, middle, high = (format(mark, form) for mark in marks)
    return f"{middle} ({low}-{high})"
