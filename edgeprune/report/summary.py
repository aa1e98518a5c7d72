"""What a reader who has a minute should know: the best of each comparison, and what is unproven."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from edgeprune.bench.bench import BenchResult, Row
from edgeprune.compare.result_tables import grouped
from edgeprune.compare.results import Comparison, Result
from edgeprune.compare.titles import DENSE
from edgeprune.intervals import difference, wilson
from edgeprune.report.html import Markup, bullets, table
from edgeprune.report.sources import Sources
from edgeprune.tables import Table


def summary(sources: Sources) -> Iterator[Markup]:
    """A table for each comparison, a line for each timing, and how much was checked."""
    for comparison in sources.comparisons:
        if lines := list(_best(comparison)):
            yield table(_best_table(comparison, lines))
    facts = [fact for result in sources.timings for fact in _fastest(result)]
    if sources.bundles:
        facts.append(_checked(sources))
    if sources.left_out:
        facts.append(f"{len(sources.left_out)} files could not be read; the last section has why.")
    if facts:
        yield bullets(facts)


def _best_table(comparison: Comparison, lines: Sequence[Sequence[str]]) -> Table:
    setup = comparison.setup
    caption = (
        f"{setup['model']}, {setup['questions']:,} questions to each bundle: the dense model, and"
        " at each ratio the method that is right most often. ± is half of the 95% interval: of a"
        " share Wilson's, of the change that of paired answers. The best of many on the same"
        " questions looks a little better than it is."
    )
    heads = ("CR", "method", "accuracy %", "change, points", "prefill x", "decode x", "KV cache")
    return Table(caption, heads, lines)


def _best(comparison: Comparison) -> Iterator[list[str]]:
    groups = grouped(comparison.cells)
    dense = next((g[0] for g in groups if g[0].title == DENSE), None)
    pruned = [group for group in groups if group[0].method != DENSE]
    first: dict[float, list[Result]] = {}
    for group in pruned:
        first.setdefault(group[0].cr_asked, group)  # the best of a ratio comes first
    if dense:
        yield _row([dense], dense)
    for group in first.values():
        yield _row(group, dense)


def _row(group: Sequence[Result], dense: Result | None) -> list[str]:
    one, share = group[0], statistics.mean(cell.share for cell in group)
    low, high = wilson(*one.total)
    said = f"{100 * share:.1f}" + (f" ± {50 * (high - low):.1f}" if len(group) == 1 else "")
    cells = [f"{one.cr:.3g}", one.marked, said]
    if dense is None or one is dense:
        return [*cells, "-", "-", "-", f"{one.kv_bytes / 1e3:,.0f} kB"]
    speedups = [_speedup(one, dense, part) for part in ("prefill", "decode")]
    kept = f"{one.kv_bytes / dense.kv_bytes:.0%} of dense" if dense.kv_bytes else "-"
    return [*cells, _change(group, dense, share), *speedups, kept]


def _change(group: Sequence[Result], dense: Result, share: float) -> str:
    marks = group[0].marks
    if len(group) > 1 or not marks or len(marks) != len(dense.marks):
        return f"{100 * (share - dense.share):+.1f}"
    found, half = difference(marks, dense.marks)
    return f"{100 * found:+.1f} ± {100 * half:.1f}"


def _speedup(one: Result, dense: Result, part: str) -> str:
    if not (one.rounds and dense.rounds):
        return "-"
    rounds = zip(dense.rounds[part], one.rounds[part], strict=True)
    return f"{statistics.median(base / other for base, other in rounds):.2f}"


def _fastest(result: BenchResult) -> Iterator[str]:
    """Of each backend the bundle that answers first, beside the first one of the list."""
    backends = dict.fromkeys(row.backend for row in result.rows)
    for backend in backends:
        own = [row for row in result.rows if row.backend == backend]
        best = min(own, key=lambda row: row.first_token)
        if best is not own[0]:
            yield _faster(best, own[0])


def _faster(best: Row, first: Row) -> str:
    return (
        f"{best.backend}: {best.name} has its first token after {1e3 * best.first_token:.1f} ms,"
        f" {first.name} after {1e3 * first.first_token:.1f} ms"
        f" ({first.first_token / best.first_token:.2f} x)."
    )


def _checked(sources: Sources) -> str:
    unproven = [manifest.name for manifest in sources.bundles if not manifest.parity.samples]
    number = len(sources.bundles)
    if unproven:
        named = ", ".join(unproven)
        return f"Parity was NOT checked for {len(unproven)} of {number} bundles: {named}."
    return f"Parity with the eager model was checked for all of the bundles: {number}."
