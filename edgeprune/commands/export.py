"""`edgeprune export`: a checkpoint and a method become a bundle."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.commands import _common
from edgeprune.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from edgeprune._progress import Bar
    from edgeprune.calib.schedule import Schedule
    from edgeprune.export.exporter import Exported
    from edgeprune.models import Adapter
    from edgeprune.models._processor import Processor, Prompt
    from edgeprune.policies import Policy
    from edgeprune.spec import PruneSpec


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "export",
        help="freeze a model and a pruning method into a bundle",
        description="Freeze a vision-language model and a pruning method into static ONNX graphs.",
    )
    _common.add_model(command)
    _common.add_method(command)
    _common.add_calibration(command)
    command.add_argument("--schedule", type=Path, metavar="FILE", help="solved before: calibrate")
    command.add_argument("-o", "--output", type=Path, help="default out/MODEL-METHOD-crCR")
    command.add_argument("--target", default="cpu", help="cpu (default), cuda or rtx")
    command.add_argument("--dtype", help="fp32, fp16 or bf16 (default: the target's)")
    command.add_argument(
        "--parity", type=int, metavar="N", help="samples of the parity check; 0 leaves it out"
    )
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from edgeprune import policies
    from edgeprune._progress import Bar
    from edgeprune.export.exporter import ExportRequest, export, preflight
    from edgeprune.models._processor import Processor
    from edgeprune.spec import check_cr

    started = time.perf_counter()
    spec = _common.spec(args)
    policy = policies.make(spec)
    output = args.output or Path("out") / _bundle_name(args.model, spec)
    adapter = _common.model(args)
    _common.check_reach(spec, adapter.shape)
    preflight(output, args.target, args.dtype, adapter)
    samples, why = _parity(args, adapter)
    processor = Processor(adapter.checkpoint.folder, adapter.image_token_id)
    with Bar() as bar:
        schedule = _schedule(args, spec, adapter, policy, processor, bar)
        plan = policy.plan(adapter.shape, spec.cr, schedule)
        check_cr(plan, spec.cr)
        request = ExportRequest(
            model=_model_name(args.model),
            spec=spec,
            plan=plan,
            output=output,
            target=args.target,
            dtype=args.dtype,
            schedule=schedule.record() if schedule else None,
            no_parity=why,
        )
        prompts = _prompts(samples, args, adapter, processor)
        exported = export(request, adapter, policy, processor, prompts, bar)
    print(_summary(exported, time.perf_counter() - started), file=sys.stderr)
    print(exported.path)
    return 0


def _schedule(
    args: argparse.Namespace,
    spec: PruneSpec,
    adapter: Adapter,
    policy: Policy,
    processor: Processor,
    bar: Bar,
) -> Schedule | None:
    """The schedule of a method that needs one: a file's, or calibrated now."""
    if policy.first(adapter.shape, spec.cr) is None:
        if args.schedule is not None:
            raise SpecError(f"method {spec.method} follows no schedule; leave out --schedule")
        return None
    from edgeprune.calib.calibrate import calibrate
    from edgeprune.calib.schedule import read_schedule

    if args.schedule is not None:
        return read_schedule(args.schedule, adapter.shape, spec.cr)
    return calibrate(_common.calibration(args, spec.cr), adapter, policy, processor, bar)


def _parity(args: argparse.Namespace, adapter: Adapter) -> tuple[int, str]:
    """How many samples to check, and why none where none."""
    from edgeprune.export.exporter import lowering
    from edgeprune.models._memory import fits, needed_bytes

    if args.parity is not None and args.parity < 0:
        raise SpecError(f"--parity is a number of samples, 0 for none; got {args.parity}")
    if args.parity == 0:
        return 0, "left out by --parity 0"
    if lowering(args.target, args.dtype)[1] == "bf16":
        return 0, "ONNX Runtime runs no bf16 graphs on a CPU"
    if args.parity is None and not fits(adapter, element=8):  # the eager model, and the graph's
        need = needed_bytes(adapter, element=8) / 1e9
        return 0, f"the eager reference needs {need:.0f} GB of memory, more than is free"
    return args.parity or 8, ""


def _prompts(
    count: int, args: argparse.Namespace, adapter: Adapter, processor: Processor
) -> Iterable[Prompt]:
    """The demo's own scenes, the user's calibration samples, or noise."""
    from edgeprune.calib.samples import demo_samples, user_samples
    from edgeprune.models._processor import random_prompt

    if args.samples_file is not None:
        images = args.images or args.samples_file.parent
        return [s.prompt for s in user_samples(processor, args.samples_file, images, count)]
    if args.model == "demo":
        return [sample.prompt for sample in demo_samples(processor, count)]
    shape = adapter.shape
    return [random_prompt(adapter.image_side, shape.vocabulary, seed) for seed in range(count)]


def _model_name(model: str) -> str:
    """A hub id, or the folder's name: a bundle holds no path of the machine that made it."""
    return Path(model).resolve().name if Path(model).exists() else model


def _bundle_name(model: str, spec: PruneSpec) -> str:
    stem = _model_name(model).rpartition("/")[2]
    return f"{stem}-{spec.method}" + (f"-cr{spec.cr:g}" if spec.cr != 1 else "")


def _summary(exported: Exported, seconds: float) -> str:
    manifest = exported.manifest
    prune, sizes = manifest.prune, {n: f.bytes / 1e6 for n, f in manifest.files.items()}
    lines = [
        f"visual tokens {prune.visual_tokens} -> {' '.join(str(n) for n in prune.counts)}",
        f"CR asked {prune.cr:g}, reached {prune.cr_reached:.3f}",
    ]
    if prune.schedule:
        lines.append(
            f"schedule: objective {prune.schedule['objective']:.4g}, proven within"
            f" {prune.schedule['gap']:.1%} of the optimum"
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
