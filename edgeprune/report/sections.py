"""The parts of a report: each takes what was read and gives its elements, or none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from edgeprune.bench import figure as bench_figure
from edgeprune.bench.bench import BenchResult
from edgeprune.bench.table import HEADS, rows
from edgeprune.compare import figure as compare_figure
from edgeprune.compare.results import Comparison
from edgeprune.drawing.canvas import Pen
from edgeprune.drawing.schedule_chart import chart
from edgeprune.graph_contract import WEIGHTS
from edgeprune.manifest import Manifest
from edgeprune.report.evaluation import Evaluation
from edgeprune.report.html import Markup, bullets, element, figure, table
from edgeprune.tables import Table

CHART = 640, 300  # width and height of a schedule, in pixels at scale 1
TIMES = ("vision ms", "prefill ms", "TTFT ms", "decode ms/token", "tok/s")
SPEEDUPS = ("vision x", "vision limit x", "TTFT x", "prefill x", "limit x", "reached", "decode x")
MEMORY = ("weights", "KV MB", "peak MB", "load s", "build s", "J")


def pruned(bundles: Sequence[Manifest]) -> Iterator[Markup]:
    """What was pruned: a row and a chart for each bundle."""
    heads = ("bundle", "model", "encoder", "method", "CR", "visual tokens", "enter the layers")
    yield table(
        Table(
            "What was pruned: of the visual tokens of an image, how many enter the first and the"
            " last decoder layer.",
            (*heads, "target", "dtype", "weights", "MB"),
            [_pruned(manifest) for manifest in bundles],
        )
    )
    yield element("div", *map(_schedule, bundles), class_="charts")


def _schedule(manifest: Manifest) -> Markup:
    counts = ", ".join(map(str, manifest.prune.counts))
    caption = f"{manifest.name}: visual tokens that enter each layer: {counts}."
    return figure(chart(manifest.prune, *CHART, Pen()), caption)


def _pruned(manifest: Manifest) -> list[str]:
    prune = manifest.prune
    options = (f"{name}={value}" for name, value in prune.options.items())
    return [
        manifest.name,
        manifest.model,
        manifest.encoder.method,
        " ".join([prune.method, *options]),
        f"{prune.cr_reached:.2f}",
        str(prune.visual_tokens),
        f"{prune.counts[0]} to {prune.counts[-1]}",
        manifest.target,
        manifest.dtype,
        manifest.weights.format if manifest.weights else "float",
        f"{manifest.files[WEIGHTS].bytes / 1e6:,.1f}",
    ]


def accuracy(comparisons: Iterable[Comparison]) -> Iterator[Markup]:
    """Right answers of each comparison: figure, tables, what was replaced."""
    for comparison in comparisons:
        setup = comparison.setup
        yield element("h3", f"{setup['model']}, {setup['questions']:,} questions")
        if comparison.cells:
            named = f"{setup['model']}: accuracy of each method at each ratio; tables follow."
            yield figure(compare_figure.figure(comparison), named)
        yield from map(table, comparison.tables())
        if notes := comparison.stand_ins():
            yield element("p", "* A part of the published method is replaced:")
            yield bullets(f"{name}: {what}." for name, what in notes.items())


def tasks(evaluations: Sequence[Evaluation]) -> Iterator[Markup]:
    """Scores of lmms-eval, a row for each task, metric and run."""
    lines = [
        [
            score.task,
            score.metric.partition(",")[0],
            _score(score.value, score.error),
            "-" if score.samples is None else f"{score.samples:,}",
            run.model,
            run.arguments,
        ]
        for run in evaluations
        for score in run.scores
    ]
    lines.sort(key=lambda line: (line[0], line[1]))
    caption = "Scores of lmms-eval, ± half of the 95% interval: 1.96 times the standard error."
    heads = ("task", "metric", "score", "samples", "model", "arguments")
    yield table(Table(caption, heads, lines))


def _score(value: float, error: float | None) -> str:
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {1.96 * error:.2g}"


def times(timings: Iterable[BenchResult]) -> Iterator[Markup]:
    """Times by backend: figure, table, agreement of backends, what did not run."""
    for result in timings:
        asked = result.request
        yield element("h3", _machine(result))
        if result.rows:
            named = f"One request: image, {asked['text_tokens']} text tokens and the answer."
            yield figure(bench_figure.figure(result), named)
            caption = (
                f"{asked['text_tokens']} text tokens, {asked['new_tokens']} new ones; medians"
                " (p10-p90) over rounds in which every bundle runs once. Speed-ups are to the first"
                " bundle on the same backend; the limit is what counting operations allows."
            )
            yield table(_columns(result, caption, (*TIMES, *SPEEDUPS)))
        if result.agreements:
            yield element("p", "What backends answer to the same input:")
            yield bullets(one.line() for one in result.agreements)
        if result.absent:
            lines = [[one.name, one.backend, one.why] for one in result.absent]
            yield table(Table("Did not run:", ("bundle", "backend", "why"), lines))


def memory(timings: Iterable[BenchResult]) -> Iterator[Markup]:
    """What bundles hold and use, and where power was read."""
    for result in timings:
        if result.rows:
            yield element("h3", _machine(result))
            caption = (
                "Memory: weights on disk, KV caches, most that the process held, or on a GPU what"
                " it holds for the bundle. J: energy of one request, a dash where the machine"
                " measures no power."
            )
            yield table(_columns(result, caption, MEMORY))
            if meters := sorted({row.meter for row in result.rows if row.meter}):
                yield element("p", f"Power is from: {', '.join(meters)}.")


def _machine(result: BenchResult) -> str:
    """What it was measured on, as its driver or system names it."""
    known = (result.machine.get(name) for name in ("gpu", "processor"))
    return next((name for name in known if name), "a machine without a name")


def _columns(result: BenchResult, caption: str, chosen: Sequence[str]) -> Table:
    heads = ("bundle", "backend", *chosen)
    places = [HEADS.index(head) for head in heads]
    return Table(caption, heads, [[row[i] for i in places] for row in rows(result)])
