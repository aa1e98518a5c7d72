"""The parts of a report about trust: parity, half precision, versions and the files themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from edgeprune.bench.bench import BenchResult
from edgeprune.compare.results import Comparison
from edgeprune.manifest import Manifest
from edgeprune.measured import DistanceRecord
from edgeprune.report.html import Markup, table
from edgeprune.report.sources import LeftOut, SourceFile
from edgeprune.tables import Table


def parity(bundles: Sequence[Manifest]) -> Iterator[Markup]:
    """What each export compared, and how far roundings are from the float32 model."""
    heads: Sequence[str] = (
        "bundle",
        "samples",
        "ties",
        "visual tokens",
        "logits",
        "tolerance",
        "fp16 margin",
    )
    caption = (
        "Parity: graphs in ONNX Runtime beside the eager model, both in float32. Largest"
        " differences, as a share of the largest value; in a tie other tokens are kept, and the"
        " reference does so too where it is rounded otherwise. fp16 margin: 65,504 over the largest"
        " magnitude."
    )
    yield table(Table(caption, heads, [_parity(manifest) for manifest in bundles]))
    if lines := [line for manifest in bundles for line in _distances(manifest)]:
        caption = (
            "Distance to the float32 model with the checkpoint's own weights: kept tokens in common"
            " at the site that has least, median distance of logits in their standard deviations,"
            " equal next tokens."
        )
        heads = ("bundle", "what", "kept in common", "logits", "next tokens")
        yield table(Table(caption, heads, lines))


def _parity(manifest: Manifest) -> list[str]:
    found, margin = manifest.parity, manifest.range
    said = f"{margin.margin:.3g}" if margin else "-"
    if not found.samples:
        return [manifest.name, f"NOT checked: {found.why}", *["-"] * 4, said]
    compared = [f"{one:.1e}" for one in (found.visual, found.logits, found.tolerance)]
    return [manifest.name, str(found.samples), str(found.ties), *compared, said]


def _distances(manifest: Manifest) -> Iterator[list[str]]:
    weights = manifest.weights
    named: Mapping[str, DistanceRecord | None] = {
        f"{manifest.dtype}, rounded after every operator": manifest.parity.eager,
        f"{manifest.dtype} graph, ONNX Runtime on a CPU": manifest.parity.graph,
        f"weights {weights.format if weights else ''}": weights.distance if weights else None,
        "the same, activations rounded, eager": weights.rounded if weights else None,
        "the same as it runs, activations rounded": weights.running if weights else None,
    }
    for what, distance in named.items():
        if distance:
            least = min(distance.overlap.values(), default=1.0)
            shares = f"{least:.1%}", f"{distance.logits:.2g}", f"{distance.tokens:.1%}"
            yield [manifest.name, what, *shares]


def versions(
    bundles: Sequence[Manifest], timings: Iterable[BenchResult], comparisons: Iterable[Comparison]
) -> Iterator[Markup]:
    """What made the bundles, and the machines that ran them; equal ones share a row."""
    yield from _versions(
        "Bundles were made with:",
        "bundles",
        [(manifest.name, manifest.versions) for manifest in bundles],
    )
    runs = [(", ".join(map(str, one.request["bundles"])), one.machine) for one in timings]
    runs += [
        (f"compare of {c.setup['model']}", _texts(c.setup.get("machine"))) for c in comparisons
    ]
    for name, machine in runs:
        if machine:
            lines = [[key, value] for key, value in machine.items()]
            yield table(Table(f"Measured on: {name}", ("what", "value"), lines))


def _texts(machine: object) -> dict[str, str]:
    found = machine if isinstance(machine, dict) else {}
    return {str(key): str(value) for key, value in found.items()}


def _versions(
    caption: str, head: str, named: Sequence[tuple[str, dict[str, str]]]
) -> Iterator[Markup]:
    packages = sorted({package for _, found in named for package in found})
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, found in named:
        groups.setdefault(tuple(found.get(p, "-") for p in packages), []).append(name)
    if groups:
        lines = [[", ".join(names), *found] for found, names in groups.items()]
        yield table(Table(caption, (head, *packages), lines))


def files(read: Sequence[SourceFile], left_out: Sequence[LeftOut]) -> Iterator[Markup]:
    """What this page was made of, and what it lacks."""
    if left_out:
        lines = [[one.name, one.why] for one in left_out]
        yield table(Table("Left out, since it could not be read:", ("file", "why"), lines))
    lines = [[one.name, one.kind, one.sha256] for one in read]
    caption = "This page was made of these files; a bundle's other files were not read."
    yield table(Table(caption, ("file", "kind", "SHA-256"), lines))
