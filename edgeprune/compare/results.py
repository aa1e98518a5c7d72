"""What came out of a comparison, as JSON, CSV and Markdown; the JSON may come from anybody."""

from __future__ import annotations

import csv
import io
import json
import statistics
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import numpy as np

from edgeprune.compare import result_tables
from edgeprune.compare.result_tables import PARTS
from edgeprune.compare.titles import DENSE, FLOAT, titled
from edgeprune.intervals import wilson
from edgeprune.records import Amount, Between, Bytes, Count, Few, Matches, Ratio, build, parse
from edgeprune.tables import Table

Milliseconds = Annotated[float, Between(1e-6, 1e9)]


@dataclass(frozen=True)
class Result:
    """One bundle: what it answered right, by kind of question, and how long its rounds took."""

    method: str  # with what is not its default
    cr_asked: Ratio
    cr: Ratio  # reached
    counts: tuple[Amount, ...]  # r_1 ... r_L
    right: dict[str, Amount]
    asked: dict[str, Count]
    seed: Annotated[int, Between(0, (1 << 63) - 1)] = 0
    bundle: str = ""  # hash of what it holds
    kv_bytes: Bytes = 0  # of the caches, once the median prompt is read
    rounds: dict[str, list[Milliseconds]] = field(default_factory=dict)  # ms by part; decode per
    # token
    weights: str = FLOAT  # of products
    weight_bytes: Bytes = 0  # of all weights
    tiles: Few | None = None  # of an image that are encoded beside the view of the whole; None: all
    stands_in: str = ""  # what stands in for a part of the published method
    marks: Annotated[str, Matches("[01]*", "a 0 or 1 for each question")] = ""  # 1: right

    def __post_init__(self) -> None:
        if not self.asked or self.right.keys() != self.asked.keys():
            raise ValueError(f"{self.method} answered other kinds of questions than it was asked")
        if any(self.right[kind] > asked for kind, asked in self.asked.items()):
            raise ValueError(f"{self.method} has more right answers than questions")
        if self.marks and self.total != (self.marks.count("1"), len(self.marks)):
            raise ValueError(f"{self.method} has other right answers than its marks say")
        rounds = {part: len(found) for part, found in self.rounds.items()}
        if rounds and (
            set(rounds) != set(PARTS) or len({*rounds.values()}) > 1 or 0 in rounds.values()
        ):
            raise ValueError(f"{self.method} lacks times of {' or '.join(PARTS)}")

    @property
    def title(self) -> str:
        """The method, the weights where they are quantised, the tiles where not all are encoded."""
        return titled(self.method, self.weights, self.tiles)

    @property
    def total(self) -> tuple[int, int]:
        """Right and asked, over all kinds."""
        return sum(self.right.values()), sum(self.asked.values())

    @property
    def share(self) -> float:
        right, asked = self.total
        return right / asked

    @property
    def marked(self) -> str:
        """The title, with a star where something stands in for a part of the method."""
        return f"{self.title} *" if self.stands_in else self.title

    def median(self, part: str) -> float:
        """Milliseconds of the middle round."""
        return statistics.median(self.rounds[part])


@dataclass(frozen=True)
class Missing:
    """A cell without a result, and why."""

    method: str
    cr_asked: Ratio
    why: str


@dataclass(frozen=True)
class Comparison:
    """All cells, those that cannot be, those that failed, and what they were measured with."""

    setup: dict[str, Any]
    cells: tuple[Result, ...]
    out_of_reach: tuple[Missing, ...] = ()
    failed: tuple[Missing, ...] = ()

    def __post_init__(self) -> None:
        if len({frozenset(cell.asked) for cell in self.cells}) > 1:
            raise ValueError("bundles were asked different kinds of questions")
        if len({len(found) for cell in self.cells for found in cell.rounds.values()}) > 1:
            raise ValueError("bundles were timed in different numbers of rounds")

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """ValueError or TypeError where the text is not what `to_json` writes."""
        found: Comparison = build(cls, parse(text), "comparison")
        return found

    def to_json(self) -> str:
        """One line per cell, shares and intervals beside the numbers that they follow from."""
        cells = [json.dumps({**asdict(cell), **_shown(cell)}) for cell in self.cells]
        lists = {"out_of_reach": self.out_of_reach, "failed": self.failed}
        parts = [f'"setup": {json.dumps(self.setup)}', '"cells": [\n' + ",\n".join(cells) + "\n]"]
        parts += [f'"{k}": {json.dumps([asdict(m) for m in v])}' for k, v in lists.items()]
        return "{\n" + ",\n".join(parts) + "\n}\n"

    def to_csv(self) -> str:
        """One row per bundle, and one for each cell without a bundle."""
        rows: list[dict[str, object]] = [_row(cell) for cell in self.cells]
        rows += [
            {"method": cell.method, "cr_asked": cell.cr_asked, "why_missing": cell.why}
            for cell in (*self.out_of_reach, *self.failed)
        ]
        heads = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, heads, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def to_markdown(self) -> str:
        """Accuracy, time, and what is missing, each as a table with its caption."""
        parts = [f"{table.caption}\n\n{table.markdown()}" for table in self.tables()]
        if notes := "\n".join(f"- {name}: {what}." for name, what in self.stand_ins().items()):
            parts.append(f"\\* A part of the published method is replaced:\n\n{notes}")
        return "\n\n".join(parts) + "\n"

    def tables(self) -> list[Table]:
        """Every table of the comparison, in the order of a report."""
        found = [result_tables.accuracy(self.cells, caption := self._caption())]
        if len({cell.cr_asked for cell in self.cells if cell.method != DENSE}) > 1:
            found.insert(0, result_tables.overview(self.cells, caption))
        if len({cell.weights for cell in self.cells}) > 1:
            found.append(result_tables.weights(self.cells))
        if len({cell.tiles for cell in self.cells}) > 1:
            found.append(result_tables.tiles(self.cells))
        if any(cell.rounds for cell in self.cells):
            found.append(result_tables.times(self.cells))
        named = {"Out of reach:": self.out_of_reach, "Failed:": self.failed}
        return found + [result_tables.missing(title, m) for title, m in named.items() if m]

    def stand_ins(self) -> dict[str, str]:
        """By method, what stands in for a part of it as published, where something does."""
        return {c.method.partition(" ")[0]: c.stands_in for c in self.cells if c.stands_in}

    def _caption(self) -> str:
        setup = self.setup
        return (
            f"{setup['questions']:,} questions each to {setup['model']}, exact match in percent,"
            " ± half of the 95% Wilson interval; several draws: their mean and their range."
        )


def _shown(cell: Result) -> dict[str, object]:
    """What follows from a cell's numbers and its method."""
    low, high = wilson(*cell.total)
    shares = {"accuracy": round(cell.share, 5), "low": round(low, 5), "high": round(high, 5)}
    return {**shares, **({"stands_in": cell.stands_in} if cell.stands_in else {})}


def _row(cell: Result) -> dict[str, object]:
    right, asked = cell.total
    row: dict[str, object] = {
        "method": cell.method,
        "cr_asked": cell.cr_asked,
        "seed": cell.seed,
        "weights": cell.weights,
        "weight_bytes": cell.weight_bytes,
        "tiles": cell.tiles or "all",
        "cr": round(cell.cr, 4),
        "counts": " ".join(map(str, cell.counts)),
        "kv_bytes": cell.kv_bytes,
        "asked": asked,
        "right": right,
        **_shown(cell),
    }
    for kind, number in cell.asked.items() if len(cell.asked) > 1 else ():
        low, high = wilson(cell.right[kind], number)
        row |= {f"{kind} asked": number, f"{kind} right": cell.right[kind]}
        row |= {f"{kind} low": round(low, 5), f"{kind} high": round(high, 5)}
    for part, rounds in cell.rounds.items():
        names = (f"{part} ms", f"{part} p10", f"{part} p90")
        found = np.quantile(rounds, [0.5, 0.1, 0.9])
        row |= {n: round(float(value), 4) for n, value in zip(names, found, strict=True)}
    return row
