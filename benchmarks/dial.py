"""A bundle with several ratios beside those that are frozen at each: engines, caches, prefill.

    python -m benchmarks.dial 0.5b --cr 2,4,8 --sites 4 --engines     # TensorRT-RTX
    python -m benchmarks.dial 0.5b --cr 2,4,8 --sites 4 --rounds 10   # ONNX Runtime, idle

UTP with made-up schedules, random weights of a real shape. No two ratios share a site, so the
bundle with all has as many as it can. All are timed in turn in every round, and a row of it is
divided by that of the frozen bundle of the same round. Checkpoint and bundles lie below --work.
"""

from __future__ import annotations

import argparse
import statistics
from itertools import pairwise
from pathlib import Path

from benchmarks.schedules import MadeUp, declining
from benchmarks.shapes import SHAPES, write
from edgeprune.bench.bench import BenchRequest, Row, bench
from edgeprune.bundle import MANIFEST, Bundle
from edgeprune.commands._common import ratios
from edgeprune.dial import on_common_sites
from edgeprune.export.exporter import ExportRequest, export
from edgeprune.export.ratios import Setting
from edgeprune.models import open_model
from edgeprune.models._processor import Processor
from edgeprune.policies import make
from edgeprune.runtime.build import BuildRequest, build
from edgeprune.spec import PruneSpec
from edgeprune.tables import plain

Bundles = tuple[dict[float, Path], Path]
"""The frozen bundle of each ratio, and the one with all."""


def stepped(counts: tuple[int, ...], sites: int, shift: int) -> tuple[int, ...]:
    """A schedule that falls `sites` times, each fall `shift` layers late; each run is its mean."""
    layers = len(counts)
    falls = [round(n * layers / (sites + 1)) + shift for n in range(1, sites + 1)]
    runs = [counts[a:b] for a, b in pairwise([0, *falls, layers])]
    return tuple(round(sum(run) / len(run)) for run in runs for _ in run)


def bundles(shape: str, asked: tuple[float, ...], sites: int, work: Path, target: str) -> Bundles:
    """Export what is not there yet; nothing is calibrated or checked."""
    checkpoint = work / shape
    if not (checkpoint / "config.json").is_file():
        write(SHAPES[shape], checkpoint)
    adapter, policy = open_model(str(checkpoint)), make(PruneSpec("utp"))
    visual, layers = adapter.shape.visual_tokens, adapter.shape.layers
    settings = list[Setting]()
    for shift, cr in enumerate(asked):
        counts = stepped(declining(visual, layers, cr), sites, shift)
        settings.append(
            Setting(PruneSpec("utp", cr), policy.plan(adapter.shape, cr, MadeUp(counts)))
        )
    common = on_common_sites([setting.plan for setting in settings])
    dial = tuple(Setting(s.spec, plan) for s, plan in zip(settings, common, strict=True))

    def made(name: str, first: Setting, several: tuple[Setting, ...] = ()) -> Path:
        path = work / f"{shape}-{name}-{sites}-{target}"
        if not (path / MANIFEST).is_file():
            given = shape, first.spec, first.plan, path, target
            request = ExportRequest(*given, no_parity="only timed", dial=several)
            export(request, adapter, policy, Processor(adapter), [])
        return path

    frozen = {s.spec.cr: made(f"frozen{s.spec.cr:g}", s) for s in settings}
    return frozen, made("dial" + "-".join(f"{cr:g}" for cr in asked), dial[0], dial)


def engines(frozen: dict[float, Path], dial: Path, backend: str, compute: str) -> str:
    """Bytes of both engines of every bundle, and how many times the largest frozen one."""
    sizes = dict[str, int]()
    for path in (*frozen.values(), dial):
        built = build(BuildRequest(path, backend, compute=(compute,)))
        sizes[path.name] = sum(engine["bytes"] for engine in built.record["engines"].values())
    most = max(size for name, size in sizes.items() if name != dial.name)
    rows = [(name, f"{size / 1e6:,.1f} MB", f"{size / most:.3f}") for name, size in sizes.items()]
    sites = len(Bundle.open(dial, verify=False).manifest.prune.stages)
    return (
        plain([("bundle", "engines", "of the largest frozen"), *rows]) + f"\n{sites} sites in all"
    )


def timed(frozen: dict[float, Path], dial: Path, rounds: int, threads: int | None) -> str:
    """Median prefill of each ratio with all and alone, and the median of their ratio by round."""
    every = (*frozen.values(), dial)
    found = bench(BenchRequest(every, rounds=rounds, threads=threads, ratios=tuple(frozen)))
    rows = {row.name: row for row in found.rows}
    heads = ("CR", "frozen ms", "with all ms", "ratio", "vision ratio", "decode ratio", "KV MB")
    lines = [heads]
    for cr, path in frozen.items():
        alone, here = rows[path.name], rows[f"{dial.name}@{cr:g}"]
        quotients = (_apart(alone, here, part) for part in ("prefill", "vision", "decode"))
        times = (f"{1e3 * statistics.median(row.rounds.prefill):.1f}" for row in (alone, here))
        kept = f"{here.kv_bytes / 1e6:.2f}"
        lines.append((f"{cr:g}", *times, *(f"{q:.3f}" for q in quotients), kept))
    return plain(lines)


def _apart(alone: Row, here: Row, part: str) -> float:
    pairs = zip(getattr(alone.rounds, part), getattr(here.rounds, part), strict=True)
    return statistics.median(dialed / own for own, dialed in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description="Several ratios in one bundle, beside one each.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--cr", type=ratios, default=(2.0, 4.0, 8.0), metavar="CR,...")
    parser.add_argument("--sites", type=int, default=4, help="of each ratio (default 4)")
    parser.add_argument("--engines", action="store_true", help="compile, in place of timing")
    parser.add_argument("--backend", default="trt-rtx")
    parser.add_argument("--compute", default="SM86")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--work", type=Path, default=Path("out/speed"))
    args = parser.parse_args()
    target = "rtx" if args.engines else "cpu"
    frozen, dial = bundles(args.shape, args.cr, args.sites, args.work, target)
    if args.engines:
        print(engines(frozen, dial, args.backend, args.compute))
    else:
        print(timed(frozen, dial, args.rounds, args.threads))


if __name__ == "__main__":
    main()
