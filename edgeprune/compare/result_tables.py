"""What came out of a comparison as tables: accuracy, times, what weights cost, what is missing."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from edgeprune.compare.titles import DENSE, FLOAT, titled
from edgeprune.intervals import difference, wilson
from edgeprune.tables import Table, spread

if TYPE_CHECKING:
    from edgeprune.compare.results import Missing, Result

PARTS = ("vision", "prefill", "decode")

_TIMES = (
    "Milliseconds: median (p10-p90) over rounds in which every bundle runs once; decode per"
    " token. Speed-up of prefill over the dense model, within each round; KV cache once the prompt"
    " is read."
)


_WEIGHTS = (
    "Weights by format: right answers in percent, in brackets the change from floats with half of"
    " its 95% interval, paired by question, median milliseconds of prefill and of a decoded token"
    " where they were timed, megabytes of all weights."
)


_TILES = (
    "Tiles of an image that are encoded, beside the view of the whole: right answers in percent, in"
    " brackets the change from all tiles with half of its 95% interval, paired by question, visual"
    " tokens that enter the first layer, and where they were timed median milliseconds of vision"
    " and of prefill."
)


def overview(cells: Iterable[Result], caption: str) -> Table:
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
    names = {group[0].title: group[0].marked for group in pruned}
    lines = [
        [names[method], *(_overall(found.get((method, cr), []), cr) for cr in ratios)]
        for method in methods
    ]
    dense = [
        [group[0].title, *(_interval(*group[0].total) for _ in ratios)]
        for group in groups
        if group[0].method == DENSE
    ]
    return Table(caption, ("method", *(f"CR {_ratio(cr)}" for cr in ratios)), (*dense, *lines))


def _overall(group: Sequence[Result], cr: float) -> str:
    """What draws of one method and ratio answer right; a dash where there are none."""
    if not group:
        return "-"
    shares = sorted(100 * cell.share for cell in group)
    text = _interval(*group[0].total)
    if len(group) > 1:
        text = f"{statistics.mean(shares):.1f} ({shares[0]:.1f} to {shares[-1]:.1f})"
    return text if abs(group[0].cr / cr - 1) <= 0.01 else f"{text} at {_ratio(group[0].cr)}"


def accuracy(cells: Iterable[Result], caption: str) -> Table:
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
        lines.append([one.marked, _ratio(one.cr), _overall(group, one.cr), *shares])
    return Table(caption, ("method", "CR", "overall", *kinds), lines)


def times(cells: Iterable[Result]) -> Table:
    """A row per timed bundle, in the order of the accuracy table."""
    timed = [group[0] for group in grouped(cells) if group[0].rounds]
    dense = min(timed, key=lambda c: (c.method != DENSE, c.weights != FLOAT, c.tiles is not None))
    lines = []
    for cell in timed:
        ratios = zip(dense.rounds["prefill"], cell.rounds["prefill"], strict=True)
        speedup = statistics.median(base / other for base, other in ratios)
        spreads = [spread(cell.rounds[part]) for part in PARTS]
        sizes = f"{cell.kv_bytes / 1e3:,.0f}", f"{cell.weight_bytes / 1e6:,.1f}"
        lines.append([cell.marked, _ratio(cell.cr), *spreads, f"{speedup:.2f}", *sizes])
    return Table(_TIMES, ("method", "CR", *PARTS, "speed-up", "KV kB", "weights MB"), lines)


def weights(cells: Iterable[Result]) -> Table:
    """What quantised weights cost and save: a row per method and ratio, a column per format."""
    groups = grouped(cells)
    formats = list(dict.fromkeys(group[0].weights for group in groups))
    formats.sort(key=lambda text: text != FLOAT)
    found = {
        (titled(g[0].method, FLOAT, g[0].tiles), g[0].cr_asked, g[0].weights): g for g in groups
    }
    lines = []
    for method, cr in dict.fromkeys((name, cr) for name, cr, _ in found):
        own = [found.get((method, cr, text), []) for text in formats]
        star = " *" * any(group[0].stands_in != "" for group in own if group)
        base = own[0] if formats[0] == FLOAT else []
        lines.append([method + star, _ratio(cr), *(_cost(group, cr, base) for group in own)])
    return Table(_WEIGHTS, ("method", "CR", *formats), lines)


def _cost(group: Sequence[Result], cr: float, base: Sequence[Result]) -> str:
    """Right answers and their change, milliseconds of prefill and of a token, megabytes of
    weights."""
    if not group:
        return "-"
    one = group[0]
    times = [f"{one.median(part):.1f} ms" for part in ("prefill", "decode") if one.rounds]
    return ", ".join([_changed(group, cr, base), *times, f"{one.weight_bytes / 1e6:,.1f} MB"])


def tiles(cells: Iterable[Result]) -> Table:
    """What tiles that are not encoded cost and save: a row per number of them, a column per method
    and ratio; the most tiles first."""
    groups = grouped(cells)
    found = {(_column(g[0]), g[0].tiles): g for g in groups}
    columns = list(dict.fromkeys(column for column, _ in found))
    numbers = sorted({tiles for _, tiles in found}, key=lambda n: (n is not None, -(n or 0)))
    lines = []
    for number in numbers:
        cells_of = [(found.get((c, number), []), found.get((c, None), [])) for c in columns]
        lines.append([str(number or "all"), *(_saved(group, base) for group, base in cells_of)])
    return Table(_TILES, ("tiles", *columns), lines)


def _column(cell: Result) -> str:
    ratio = "" if cell.method == DENSE else f" CR {_ratio(cell.cr_asked)}"
    return titled(cell.method, cell.weights) + " *" * (cell.stands_in != "") + ratio


def _saved(group: Sequence[Result], base: Sequence[Result]) -> str:
    """Right answers and their change, tokens, milliseconds of encoder and prefill."""
    if not group:
        return "-"
    one = group[0]
    times = [f"{one.median(part):.1f} ms" for part in ("vision", "prefill") if one.rounds]
    return ", ".join([_changed(group, one.cr_asked, base), f"{one.counts[0]:,} tokens", *times])


def _changed(group: Sequence[Result], cr: float, base: Sequence[Result]) -> str:
    """What is answered right, and by how much more than the base."""
    one, right = group[0], _overall(group, cr)
    if base and one is not base[0] and len(group) == 1 and one.marks and base[0].marks:
        change, half = difference(one.marks, base[0].marks)
        right += f" ({100 * change:+.1f} ± {100 * half:.1f})"
    return right


def missing(caption: str, cells: Iterable[Missing]) -> Table:
    """Why there is no result, a row per cell."""
    lines = [[cell.method, _ratio(cell.cr_asked), cell.why] for cell in cells]
    return Table(caption, ("method", "CR asked", "why"), lines)


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
