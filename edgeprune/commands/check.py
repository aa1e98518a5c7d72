"""`edgeprune check`: what takes a bundle, what this machine can do, what memory a model needs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.commands import _common
from edgeprune.errors import BackendError, SpecError
from edgeprune.install_hints import install
from edgeprune.tables import plain

if TYPE_CHECKING:
    from edgeprune.export.check import Problem, Verdict
    from edgeprune.runtime.parsers import Parser

ENGINES = {"trt": "TensorRT", "rtx": "TensorRT-RTX", "ort": "ONNX Runtime"}
FOR_A_CPU = (
    "decoder.onnx: it has no output `token`, which TensorRT's backends read; export it with"
    " --target rtx, jetpack7 or jetpack6"
)
MODULES = ("onnxruntime", "tensorrt", "tensorrt_rtx", "cuda", "torch", "onnx")

Report = tuple[dict[str, Any], str]  # for programs, for people


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "check",
        help="show which engines take a bundle, or what this machine can do",
        description="With a bundle, or an ONNX file of any origin: which versions of TensorRT,"
        " TensorRT-RTX and ONNX Runtime take its graphs, and where one does not, which node and"
        " why. With --memory: what --model"
        " needs on Jetson Orin modules. With neither: what can be built and run on this machine,"
        " and what to install.",
    )
    command.add_argument(
        "bundle", nargs="?", type=Path, metavar="BUNDLE", help="exported folder, or FILE.onnx"
    )
    command.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="NAME",
        help="exit with 1 unless it takes the bundle: jetpack6, jetpack7, rtx, trt-10.7, ...; may"
        " be given again",
    )
    command.add_argument("--memory", action="store_true", help="show the memory that --model needs")
    _common.add_model(command, default=None)
    _common.add_media(command)
    command.add_argument("--cr", type=float, help="for --memory: compression ratio (default 1)")
    command.add_argument(
        "--text-capacity", type=int, metavar="N", help="for --memory: text tokens (default 512)"
    )
    command.add_argument("--json", action="store_true", help="one JSON object on stdout")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    _common.check_model(args, "check --memory")
    if args.memory != (args.model is not None):
        raise SpecError("give --model and --memory together: the memory that a model needs")
    if args.memory and args.bundle is not None:
        raise SpecError("--memory asks about --model; ask about the bundle in a command of its own")
    if not args.memory and (args.cr, args.text_capacity) != (None, None):
        raise SpecError("--cr and --text-capacity are for --memory; a bundle has its own")
    if args.target and args.bundle is None:
        raise SpecError("--target asks about a bundle; name one: edgeprune check BUNDLE --target T")
    code = 0
    if args.memory:
        record, text = _memory(args)
    elif args.bundle is not None:
        record, text = _bundle(args.bundle, args.target)
        code = int(bool(record["refused"]))
    else:
        record, text = _machine()
    print(json.dumps(record) if args.json else text)
    return code


def _bundle(path: Path, asked: list[str]) -> Report:
    from edgeprune.bundle import Bundle
    from edgeprune.runtime import parsers

    _check_targets(asked)
    if path.is_file():
        return _report(path.name, [path], [], asked)
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    weights = f", weights {manifest.weights.format}" if manifest.weights else ""
    head = f"{manifest.name}: {manifest.dialect}, opset {manifest.opset}, {manifest.dtype}{weights}"
    if (tiling := manifest.image.tiling) and tiling.kept:
        head += f"; {tiling.choice}"
    files, cpu = [bundle.file(name) for name in manifest.graph_names], manifest.target == "cpu"
    record, text = _report(manifest.name, files, parsers.ask(bundle), asked, for_a_cpu=cpu)
    return record, f"{head}\n{text}"


def _check_targets(asked: list[str]) -> None:
    try:
        from edgeprune.export.rules import TARGETS
    except ModuleNotFoundError as error:
        if error.name not in ("onnx", "google", "google.protobuf"):
            raise
        raise BackendError(
            "check BUNDLE needs the package onnx, which looks through graphs;"
            f" {install('check')} (check alone, without a bundle, needs nothing)"
        ) from error
    known = [name for target in TARGETS for name in target.names]
    if unknown := [name for name in asked if name not in known]:
        raise SpecError(f"there is no target {unknown[0]!r}; choose: {', '.join(known)}")


def _report(
    name: str, files: list[Path], here: list[Parser], asked: list[str], *, for_a_cpu: bool = False
) -> Report:
    """What every target says of some graphs, and which of those that were asked about refuse."""
    from edgeprune.export import check  # needs onnx

    verdicts = [check.check_graph(file) for file in files]
    names = [file.name for file in files]
    rows = [_row(names, found, here, for_a_cpu) for found in zip(*verdicts, strict=True)]
    refused = [row["title"] for row in rows if {*asked} & {*row["names"]} and not row["accepted"]]
    answers = [("yes" if r["accepted"] else "no", r["title"], r["first"]) for r in rows]
    reasons = dict.fromkeys(reason for row in rows for reason in row["reasons"])
    doubts = dict.fromkeys(doubt for row in rows if row["accepted"] for doubt in row["doubts"])
    said = [f"{parser.title}, asked here: {_said(parser)}" for parser in here]
    record = {
        "bundle": name,
        "targets": rows,
        "asked_here": {parser.title: _said(parser) for parser in here},
        "refused": refused,
    }
    return record, "\n".join([plain(answers), *(f"- {r}" for r in (*reasons, *doubts)), *said])


def _row(
    names: list[str], verdicts: tuple[Verdict, ...], here: list[Parser], for_a_cpu: bool
) -> dict[str, Any]:
    """What one target says of the graphs; a parser of that version that is here has a say too."""
    target = verdicts[0].target
    reasons = [r for name, v in zip(names, verdicts, strict=True) for r in _reasons(name, v)]
    release = ".".join(map(str, target.version)) + "."
    for parser in here:
        same = parser.engine == target.engine and parser.version.startswith(release)
        if same and parser.asked and parser.refusal:
            reasons.append(f"{parser.title} itself: {parser.refusal}")
    firsts = [verdict.first for verdict in verdicts]
    if target.engine != "ort" and for_a_cpu:
        reasons.append(FOR_A_CPU)
        firsts.append(None)
    known = [first for first in firsts if first is not None]
    version = ".".join(map(str, max(known))) if len(known) == len(firsts) else ""
    return {
        "names": target.names,
        "title": target.title,
        "accepted": not reasons,
        "first": f"taken from {version} on" if version else "no version is known to take it",
        "reasons": reasons,
        "doubts": [f"{target.title}: {doubt}" for verdict in verdicts for doubt in verdict.doubts],
    }


def _reasons(graph: str, verdict: Verdict) -> list[str]:
    """Each rule once: the first node that breaks it, how many more, and since when it is gone."""
    grouped: dict[str, list[Problem]] = {}
    for problem in verdict.problems:
        grouped.setdefault(problem.message, []).append(problem)
    return [_reason(graph, verdict.target.engine, problems) for problems in grouped.values()]


def _reason(graph: str, engine: str, problems: list[Problem]) -> str:
    first, more = problems[0], f" and {len(problems) - 1} more" if problems[1:] else ""
    if engine not in first.since:
        return f"{graph}: {first.node}{more}: {first.message} [{first.source}]"
    since = first.since[engine]
    until = f"before {'.'.join(map(str, since))}" if since else "in any version known"
    title = ENGINES[engine]
    return f"{graph}: {first.node}{more}: {first.message} ({title} {until}) [{first.source}]"


def _said(parser: Parser) -> str:
    if not parser.asked:
        return f"could not be asked: {parser.refusal}"
    return parser.refusal or "takes all graphs"


def _memory(args: argparse.Namespace) -> Report:
    from dataclasses import asdict

    from edgeprune.lowering import DTYPES
    from edgeprune.memory_estimate import DEVICES, GB, KEPT, KINDS, SYSTEM, estimate
    from edgeprune.spec import PruneSpec, check_reach
    from edgeprune.weight_format import WeightFormat

    cr = 1.0 if args.cr is None else args.cr
    text = 512 if args.text_capacity is None else args.text_capacity
    if text < 1:
        raise SpecError(f"--text-capacity is at least 1 token; got {text}")
    adapter = _common.model(args)
    shape, numbers = adapter.shape, adapter.checkpoint.num_parameters()
    check_reach(PruneSpec("uniform", cr), shape)
    counts = [round(shape.visual_tokens / cr)] * shape.layers

    def stored(dtype: str, format: str) -> int:
        return adapter.weight_bytes(WeightFormat.parse(format), DTYPES[dtype].bytes, KEPT)

    found = [estimate(shape, stored(*kind[1:]), counts, text, kind) for kind in KINDS]
    sums = ("weights", "bits", "KV", "KV a layer", "activations", "total")
    heads = ("target", "dtype", "--weights", *sums)
    rows: list[tuple[str, ...]] = [(*heads, *(f"Orin {name}" for name in DEVICES))]
    for b in found:
        parts = (b.weights, sum(b.caches), b.caches[0], b.activations, b.total)
        sizes = [f"{part / GB:.3f} GB" for part in parts]
        sizes.insert(1, f"{8 * b.weights / numbers:.2f}")
        fits = ("yes" if b.fits(device) else "no" for device in DEVICES.values())
        rows.append((b.target, b.dtype, b.format, *sizes, *fits))
    note = (
        f"{counts[0]} visual tokens a layer (CR {cr:g}), {text} of text;"
        f" {SYSTEM / GB:g} GB are left for the system, CUDA and the engine's code, an estimate;"
        " bits: of a weight, on average; while an engine is built more is needed: docs/weights.md"
    )
    record = {"estimates": [asdict(b) | {"total": b.total} for b in found], "note": note}
    return record, plain(rows) + "\n" + note


def _machine() -> Report:
    from dataclasses import asdict

    from edgeprune.runtime.machine import describe

    machine = describe()
    abilities, gpu = list(machine.abilities()), machine.gpu
    seen = "none, or no driver for it"
    if gpu:
        seen = f"{gpu.name}, {gpu.compute}, {gpu.bytes / 1e9:.1f} GB, driver for CUDA {gpu.driver}"
    rows = [
        ("system", machine.system),
        ("memory", f"{machine.bytes / 1e9:.1f} GB" if machine.bytes else "unknown"),
        ("JetPack", machine.jetpack),
        ("GPU", seen),
        *((name, machine.versions.get(name, "not installed")) for name in MODULES),
        ("providers", ", ".join(machine.providers) or "none"),
        *((a.what, "yes" if a.possible else f"no: {a.why}") for a in abilities),
    ]
    record = asdict(machine) | {"abilities": [asdict(ability) for ability in abilities]}
    return record, plain(rows)
