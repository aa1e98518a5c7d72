"""What came out of a comparison, as JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from edgeprune import policies
from edgeprune.compare.answers import wilson
from edgeprune.compare.cells import DENSE, FLOAT, titled
from edgeprune.tables import markdown, spread

PARTS = ("vision", "prefill", "decode")


@dataclass(frozen=True)
class Result:
    """One bundle: what it answered right, by kind of question, and how long its rounds took."""

    method: str  # with what is not its default
    cr_asked: float
    cr: float  # reached
    counts: tuple[int, ...]  # r_1 ... r_L
    right: dict[str, int]
    asked: dict[str, int]
    seed: int = 0
    bundle: str = ""  # hash of what it holds
    kv_bytes: int = 0  # of the caches, once the median prompt is read
    rounds: dict[str, list[float]] = field(default_factory=dict)  # ms by part; decode per token
    weights: str = FLOAT  # of products
    weight_bytes: int = 0  # of all weights

    @classmethod
    def read(cls, record: dict[str, Any]) -> Result:
        """From JSON; what a result does not have is passed over."""
        known = {f.name: record[f.name] for f in fields(cls) if f.name in record}
        return cls(**{**known, "counts": tuple(known["counts"])})

    @property
    def title(self) -> str:
        """The method, and the weights where they are quantised."""
        return titled(self.method, self.weights)

    @property
    def total(self) -> tuple[int, int]:
        """Right and asked, over all kinds."""
        return sum(self.right.values()), sum(self.asked.values())

    @property
    def share(self) -> float:
        right, asked = self.total
        return right / asked

    def median(self, part: str) -> float:
        """Milliseconds of the middle round."""
        return statistics.median(self.rounds[part])


@dataclass(frozen=True)
class Missing:
    """A cell without a result, and why."""

    method: str
    cr_asked: float
    why: str


@dataclass(frozen=True)
class Comparison:
    """All cells, those that cannot be, those that failed, and what they were measured with."""

    setup: dict[str, Any]
    cells: tuple[Result, ...]
    out_of_reach: tuple[Missing, ...] = ()
    failed: tuple[Missing, ...] = ()

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        content = json.loads(text)
        lists = [tuple(Missing(**m) for m in content[k]) for k in ("out_of_reach", "failed")]
        return cls(content["setup"], tuple(map(Result.read, content["cells"])), *lists)

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
        parts = [f"{self._caption()}\n\n{accuracy_table(self.cells)}"]
        if len({cell.cr_asked for cell in self.cells if cell.method != DENSE}) > 1:
            parts[:0] = [f"{self._caption()}\n\n{overview_table(self.cells)}"]
        if len({cell.weights for cell in self.cells}) > 1:
            parts.append(f"{_WEIGHTS}\n\n{weights_table(self.cells)}")
        if any(cell.rounds for cell in self.cells):
            parts.append(f"{_TIMES}\n\n{time_table(self.cells)}")
        for title, cells in (("Out of reach:", self.out_of_reach), ("Failed:", self.failed)):
            if cells:
                lines = [[c.method, _ratio(c.cr_asked), c.why] for c in cells]
                parts.append(f"{title}\n\n{markdown(['method', 'CR asked', 'why'], lines)}")
        if replaced := replacements(cell.method for cell in self.cells):
            notes = "\n".join(f"- {name}: {what}." for name, what in replaced.items())
            parts.append(f"\\* A part of the published method is replaced:\n\n{notes}")
        return "\n\n".join(parts) + "\n"

    def _caption(self) -> str:
        setup = self.setup
        return (
            f"{setup['questions']:,} questions each to {setup['model']}, exact match in percent,"
            " ± half of the 95% Wilson interval; several draws: their mean and their range."
        )


_TIMES = (
    "Milliseconds: median (p10-p90) over rounds in which every bundle runs once; decode per"
    " token. Speed-up of prefill over the dense model, within each round; KV cache once the prompt"
    " is read."
)


_WEIGHTS = (
    "Weights by format: right answers in percent, median milliseconds of prefill and of a decoded"
    " token where they were timed, megabytes of all weights."
)


def replacements(labels: Iterable[str]) -> dict[str, str]:
    """By method, what stands in for a part of it as published; those of which none does left out.

    Labels are methods with what is not their default; one that is no longer there is passed over.
    """
    methods = dict.fromkeys(label.partition(" ")[0] for label in labels)
    found = {name: policies.load(name).stands_in for name in methods if name in policies.names()}
    return {name: what for name, what in found.items() if what}


def marked(label: str) -> str:
    """A method's label, with a star where something stands in for a part of the method."""
    return f"{label} *" if replacements([label]) else label


def overview_table(cells: Iterable[Result]) -> str:
    """A row per method, a column per ratio asked for; the best over all ratios first.

    A bundle that reaches another ratio than asked says which.
    """
    groups = grouped(cells)
    pruned = [group for group in groups if group[0].method != DENSE]
    found = {(group[0].title, group[0].cr_asked): group for group in pruned}
    ratios = sorted({cr for _, cr in found})
    methods = sorted({method for method, _ in found})

    def total(method: str) -> float:
        groups = (found.get((method, cr), ()) for cr in ratios)
        return sum(statistics.mean(cell.share for cell in group) for group in groups if group)

    methods.sort(key=total, reverse=True)
    lines = [
        [marked(method), *(_overall(found.get((method, cr), []), cr) for cr in ratios)]
        for method in methods
    ]
    dense = [
        [group[0].title, *(_interval(*group[0].total) for _ in ratios)]
        for group in groups
        if group[0].method == DENSE
    ]
    return markdown(["method", *(f"CR {_ratio(cr)}" for cr in ratios)], [*dense, *lines])


def _overall(group: Sequence[Result], cr: float) -> str:
    """What draws of one method and ratio answer right; a dash where there are none."""
    if not group:
        return "-"
    shares = sorted(100 * cell.share for cell in group)
    text = _interval(*group[0].total)
    if len(group) > 1:
        text = f"{statistics.mean(shares):.1f} ({shares[0]:.1f} to {shares[-1]:.1f})"
    return text if abs(group[0].cr / cr - 1) <= 0.01 else f"{text} at {_ratio(group[0].cr)}"


def accuracy_table(cells: Iterable[Result]) -> str:
    """A row per method and ratio, the best of each ratio first; kinds where there are several."""
    groups = grouped(cells)
    kinds = list(groups[0][0].asked) if groups else []
    kinds = kinds if len(kinds) > 1 else []
    lines = []
    for group in groups:
        one = group[0]
        shares = [_interval(one.right[k], one.asked[k]) for k in kinds]
        if len(group) > 1:
            means = (statistics.mean(c.right[k] / c.asked[k] for c in group) for k in kinds)
            shares = [f"{100 * mean:.1f}" for mean in means]
        lines.append([marked(one.title), _ratio(one.cr), _overall(group, one.cr), *shares])
    return markdown(["method", "CR", "overall", *kinds], lines)


def time_table(cells: Iterable[Result]) -> str:
    """A row per timed bundle, in the order of the accuracy table."""
    timed = [group[0] for group in grouped(cells) if group[0].rounds]
    dense = min(timed, key=lambda cell: (cell.method != DENSE, cell.weights != FLOAT))
    lines = []
    for cell in timed:
        ratios = zip(dense.rounds["prefill"], cell.rounds["prefill"], strict=True)
        speedup = statistics.median(base / other for base, other in ratios)
        spreads = [spread(cell.rounds[part]) for part in PARTS]
        sizes = f"{cell.kv_bytes / 1e3:,.0f}", f"{cell.weight_bytes / 1e6:,.1f}"
        lines.append([marked(cell.title), _ratio(cell.cr), *spreads, f"{speedup:.2f}", *sizes])
    return markdown(["method", "CR", *PARTS, "speed-up", "KV kB", "weights MB"], lines)


def weights_table(cells: Iterable[Result]) -> str:
    """What quantised weights cost and save: a row per method and ratio, a column per format."""
    groups = grouped(cells)
    formats = list(dict.fromkeys(group[0].weights for group in groups))
    formats.sort(key=lambda text: text != FLOAT)
    found = {(g[0].method, g[0].cr_asked, g[0].weights): g for g in groups}
    lines = []
    for method, cr in dict.fromkeys((g[0].method, g[0].cr_asked) for g in groups):
        own = [found.get((method, cr, text), []) for text in formats]
        lines.append([marked(method), _ratio(cr), *(_cost(group, cr) for group in own)])
    return markdown(["method", "CR", *formats], lines)


def _cost(group: Sequence[Result], cr: float) -> str:
    """Right answers, milliseconds of prefill and of a token, megabytes of weights."""
    if not group:
        return "-"
    one = group[0]
    times = [f"{one.median(part):.1f} ms" for part in ("prefill", "decode") if one.rounds]
    return ", ".join([_overall(group, cr), *times, f"{one.weight_bytes / 1e6:,.1f} MB"])


def grouped(cells: Iterable[Result]) -> list[list[Result]]:
    """Cells that differ by their seed alone; by ratio, the most right first."""
    found: dict[tuple[float, str], list[Result]] = defaultdict(list)
    for cell in cells:
        found[cell.cr_asked, cell.title].append(cell)
    groups = [sorted(group, key=lambda cell: cell.seed) for group in found.values()]
    return sorted(groups, key=lambda g: (g[0].cr_asked, -statistics.mean(c.share for c in g)))


def _ratio(cr: float) -> str:
    return f"{cr:.2f}".rstrip("0").rstrip(".")


def _interval(right: int, asked: int) -> str:
    low, high = wilson(right, asked)
    return f"{100 * right / asked:.1f} ± {50 * (high - low):.1f}"


def _shown(cell: Result) -> dict[str, object]:
    """What follows from a cell's numbers and its method."""
    low, high = wilson(*cell.total)
    shares = {"accuracy": round(cell.share, 5), "low": round(low, 5), "high": round(high, 5)}
    replaced = list(replacements([cell.method]).values())
    return {**shares, **({"stands_in": replaced[0]} if replaced else {})}


def _row(cell: Result) -> dict[str, object]:
    right, asked = cell.total
    row: dict[str, object] = {
        "method": cell.method,
        "cr_asked": cell.cr_asked,
        "seed": cell.seed,
        "weights": cell.weights,
        "weight_bytes": cell.weight_bytes,
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
