"""`edgeprune export`: a checkpoint and a method become a bundle."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.commands import _common

if TYPE_CHECKING:
    from edgeprune.export.exporter import Exported
    from edgeprune.recipe import Recipe


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "export",
        help="freeze a model and a pruning method into a bundle",
        description="Freeze a vision-language model and a pruning method into static ONNX graphs.",
    )
    _common.add_model(command)
    _common.add_media(command)
    _common.add_method(command)
    _common.add_calibration(command)
    command.add_argument("--schedule", type=Path, metavar="FILE", help="solved before: calibrate")
    command.add_argument("-o", "--output", type=Path, help="default out/MODEL-METHOD-crCR")
    command.add_argument(
        "--target", default="cpu", help="cpu (default), cuda, rtx, jetpack7 or jetpack6"
    )
    command.add_argument("--dtype", help="fp32, fp16 or bf16 (default: the target's)")
    command.add_argument(
        "--parity",
        type=int,
        metavar="N",
        help="samples of the parity check, 0 for none (default 8, where memory allows)",
    )
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from edgeprune._progress import Bar
    from edgeprune.recipe import make

    started = time.perf_counter()
    recipe = _recipe(args)
    with Bar() as bar:
        exported = make(recipe, bar)
    print(_summary(exported, time.perf_counter() - started), file=sys.stderr)
    print(exported.path)
    return 0


def _recipe(args: argparse.Namespace) -> Recipe:
    from edgeprune.recipe import Recipe

    return Recipe(
        spec=_common.spec(args),
        output=args.output,
        model=args.model,
        revision=args.revision,
        image_size=args.image_size,
        shown=args.pictures,
        frames=args.frames,
        target=args.target,
        dtype=args.dtype,
        parity=args.parity,
        schedule=args.schedule,
        samples=args.samples,
        samples_file=args.samples_file,
        image_dir=args.image_dir,
        solver=args.solver,
        max_sites=args.max_sites,
    )


def _summary(exported: Exported, seconds: float) -> str:
    manifest = exported.manifest
    prune, sizes = manifest.prune, {n: f.bytes / 1e6 for n, f in manifest.files.items()}
    lines = [
        f"visual tokens {prune.visual_tokens} -> {' '.join(str(n) for n in prune.counts)}",
        f"CR asked {prune.cr:g}, reached {prune.cr_reached:.3f}",
    ]
    if prune.schedule:
        lines.append(
            f"schedule: objective {prune.schedule['objective']:.4g}; no schedule can be below"
            f" {prune.schedule['bound']:.4g}"
        )
    lines.append(_parity_line(manifest.parity))
    graphs = ("vision.onnx", "decoder.onnx", "weights.bin")
    lines.append(", ".join(f"{name} {sizes[name]:.2f} MB" for name in graphs))
    lines += [f"note: {note}" for note in exported.notes]
    lines.append(f"{manifest.dtype}, opset {manifest.opset}, {seconds:.1f} s")
    lines.append(f"next: edgeprune run {exported.path} --image PICTURE --prompt QUESTION")
    return "\n".join(lines)


def _parity_line(record: dict[str, Any]) -> str:
    if not record["samples"]:
        return f"parity NOT checked: {record['why']}"
    ties = f", {record['ties']} ties left out" if record["ties"] else ""
    return (
        f"parity with the eager reference on {record['samples']} samples: same kept tokens, logits"
        f" within {record['logits']:.1e}{ties}"
    )
