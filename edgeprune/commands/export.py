"""`edgeprune export`: a checkpoint and a method become a bundle."""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune import terminal
from edgeprune.commands import _common
from edgeprune.errors import SpecError

if TYPE_CHECKING:
    from edgeprune.export.exporter import Exported
    from edgeprune.manifest import EncoderRecord, Manifest, RatioRecord
    from edgeprune.measured import (
        ChoiceRecord,
        DistanceRecord,
        ParityRecord,
        RangeRecord,
        TimingRecord,
        WeightsRecord,
    )
    from edgeprune.recipe import Recipe


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "export",
        help="freeze a model and a pruning method into a bundle",
        description="Freeze a vision-language model and a pruning method into static ONNX graphs."
        " --method auto chooses a shorter encoder and the decoder's counts together: within --ttft"
        " MS of a --profile, or with --cr N within the operations of the dense encoder and a"
        " decoder at that ratio.",
    )
    _common.add_model(command)
    _common.add_media(command)
    _common.add_method(command, several=True)
    _common.add_calibration(command)
    _common.add_execution(command)
    command.add_argument(
        "--schedule", type=Path, metavar="FILE", help="schedule file written by edgeprune calibrate"
    )
    command.add_argument(
        "-o", "--output", type=Path, help="bundle (default out/MODEL-METHOD-crCR(-seedN))"
    )
    command.add_argument(
        "--target",
        default="cpu",
        help="where it runs: cpu (default), cuda, rtx, jetpack7 or jetpack6",
    )
    command.add_argument("--dtype", help="fp32, fp16 or bf16 (default: the target's)")
    command.add_argument(
        "--weights",
        default="float",
        metavar="FORMAT",
        help="float (default: the dtype), int8, int4, fp8 or auto; with options, as auto:bits=5,"
        " int8:activations=on or int4:block=64:head=off:vision=on:awq=on",
    )
    command.add_argument(
        "--encoder",
        metavar="METHOD",
        help="a shorter vision encoder: dense (default: not shorter); exit:at=BLOCK:keep=SHARE"
        " (patches that are not chosen leave early and come back); drop:at=BLOCK:keep=SHARE (they"
        " do not come back; --cr still counts all V visual tokens, so keep=0.5 alone is CR 2); auto"
        " (default with --ttft and --method auto): the best exit or drop, chosen with the decoder's"
        " counts. More options: edgeprune methods exit",
    )
    command.add_argument(
        "--ttft",
        type=float,
        metavar="MS",
        help="milliseconds to the first token, in place of --cr; needs --profile",
    )
    command.add_argument(
        "--profile",
        type=Path,
        metavar="FILE",
        help="times of the device, written by edgeprune profile",
    )
    command.add_argument(
        "--keep-fp32",
        choices=("none", "auto"),
        default="none",
        help="auto: in fp16, parts of the model that pass 65,504 stay in float32, found on the"
        " samples of the parity check (default none: such a model is refused)",
    )
    command.add_argument(
        "--profilable",
        action="store_true",
        help="write parts of the model as graphs of their own too, for edgeprune profile",
    )
    command.add_argument(
        "--delta",
        type=float,
        metavar="SHARE",
        help="for fixed cameras: write the encoder for this share of a frame's patches too, see:"
        " edgeprune watch --delta",
    )
    command.add_argument(
        "--parity",
        type=int,
        metavar="N",
        help="samples of the parity check, 0 for none (default 8)",
    )
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from edgeprune.making import make
    from edgeprune.progress import Bar

    started = time.perf_counter()
    recipe = _recipe(args)
    with Bar() as bar:
        exported = make(recipe, bar, partial(_common.tell, bar))
    terminal.note(_summary(exported, time.perf_counter() - started))
    print(exported.path)
    return 0


def _recipe(args: argparse.Namespace) -> Recipe:
    from edgeprune.encoder_methods import AUTO, DENSE
    from edgeprune.recipe import Recipe

    if args.ttft is not None and args.cr is not None:
        raise SpecError("--ttft and --cr are two budgets; give one of them")
    ratios = args.cr or ()
    args.cr = ratios[0] if ratios else None
    if args.method == _common.AUTO and args.encoder not in (None, AUTO) and args.ttft is None:
        raise SpecError("--method auto chooses the encoder; leave out --encoder")
    usual = AUTO if args.ttft is not None or args.method == _common.AUTO else DENSE
    return Recipe(
        spec=_common.spec(args),
        ratios=ratios if len(ratios) > 1 else (),
        output=args.output,
        model=args.model,
        revision=args.revision,
        tokenizer=args.tokenizer,
        image_size=args.image_size,
        num_images=args.num_images,
        frames=args.frames,
        tiles=args.tiles,
        target=args.target,
        dtype=args.dtype,
        weights=args.weights,
        encoder=usual if args.encoder is None else args.encoder,
        ttft=args.ttft,
        profile=args.profile,
        profilable=args.profilable,
        delta=args.delta,
        keep_fp32=args.keep_fp32,
        device=args.device,
        reference_dtype=args.reference_dtype,
        parity=args.parity,
        schedule=args.schedule,
        samples=args.samples,
        samples_file=args.samples_file,
        image_dir=args.image_dir,
        solver=args.solver,
        max_sites=args.max_sites,
        solve_seconds=args.solve_seconds,
    )


def _summary(exported: Exported, seconds: float) -> str:
    manifest = exported.manifest
    sizes = {n: f.bytes / 1e6 for n, f in manifest.files.items()}
    lines = list[str]()
    for setting in manifest.settings:
        lines += _ratio_lines(setting, manifest)
    lines += [
        *_encoder_lines(manifest),
        *_delta_lines(manifest.encoder, manifest.parity),
        *_timing_lines(manifest.timing),
        *_choice_lines(manifest.choice),
    ]
    if manifest.weights:
        lines += _weights_lines(manifest.weights)
    if manifest.range:
        lines += _range_lines(manifest.range)
    files = (*manifest.graph_names, "weights.bin")
    lines.append(", ".join(f"{name} {sizes[name]:.2f} MB" for name in files))
    lines += [f"note: {note}" for note in exported.notes]
    lines.append(f"{manifest.dtype}, opset {manifest.opset}, {seconds:.1f} s")
    lines.append(f"next: edgeprune run {exported.path} --image IMAGE --prompt QUESTION")
    return "\n".join(lines)


def _ratio_lines(setting: RatioRecord, manifest: Manifest) -> list[str]:
    """The counts of a ratio, the schedule behind them, and what was compared."""
    from edgeprune.cost import kv_bytes
    from edgeprune.lowering import DTYPES

    prune, element = setting.prune, DTYPES[manifest.dtype].bytes
    lines = [
        f"visual tokens {prune.visual_tokens} -> {' '.join(str(n) for n in prune.counts)}",
        f"CR asked {prune.cr:g}, reached {prune.cr_reached:.3f}",
    ]
    if manifest.choice or prune.method == "none":  # a budget asked, or the encoder alone
        lines[1] = f"CR {prune.cr_reached:.3f}"
    if manifest.ratios:
        held = kv_bytes(manifest.decoder, prune.counts, 0, element)
        default = " (the default)" if setting is manifest.ratios[0] else ""
        lines[1] += f"{default}; its image takes {held / 1e6:.3g} MB of KV cache"
    if prune.schedule:
        lines.append(
            f"schedule: objective {prune.schedule['objective']:.4g}; no schedule can be below"
            f" {prune.schedule['bound']:.4g}"
        )
    return lines + _parity_lines(setting.parity, manifest.dtype)


def _timing_lines(record: TimingRecord | None) -> list[str]:
    """What a profile predicts."""
    if record is None:
        return []
    return [
        f"first token: {record.predicted:.4g} ms predicted of {record.asked:.4g} asked, with"
        f" {record.text_tokens} text tokens on {record.backend} (before {record.before:.1f},"
        f" vision {record.vision:.1f}, prefill {record.prefill:.1f})"
    ]


def _choice_lines(record: ChoiceRecord | None) -> list[str]:
    """What was chosen together, and what the others that were measured would have lost."""
    if record is None:
        return []
    losses = ", ".join(f"{name} {loss:.3f}" for name, loss in record.losses.items())
    return [
        f"chosen for {record.budget:.6g} {record.unit} ({record.spent:.4g} used, {record.loss:.3f}"
        f" radians predicted); least loss with each encoder that was measured: {losses}"
    ]


def _encoder_lines(manifest: Manifest) -> list[str]:
    """Which tiles are left out, what leaves the encoder early, and what that costs."""
    record, tiling = manifest.encoder, manifest.image.tiling
    share = f"{record.share:.2f} of the operations"
    lines = [f"encoder: {tiling.choice}, {share}"] if tiling and tiling.kept else []
    if record.angle is None:
        return lines
    fit = "" if record.r2 is None else f", map R2 {record.r2:.3f}"
    return [
        *lines,
        f"encoder {record.method}: {record.kept} of {record.units} go through all"
        f" {record.blocks} blocks, {share}{fit}; output turned by"
        f" {record.angle:.3f} radians on {record.samples} samples",
    ]


def _delta_lines(record: EncoderRecord, parity: ParityRecord) -> list[str]:
    """How frames of a fixed camera are encoded."""
    if (delta := record.delta) is None:
        return []
    what = "a frame" if record.tiles == 1 else f"each of {record.tiles} tiles"
    share = f"{record.changed_share:.2f} of the operations"
    line = f"delta: {delta.patches} of {record.patches} patches of {what}, {share}"
    return [line if parity.delta is None else f"{line}; parity within {parity.delta:.1e}"]


def _range_lines(record: RangeRecord) -> list[str]:
    """What float16 holds, and what stays in float32."""
    from edgeprune.export.ranges import summary

    kept = [f"in float32: {', '.join(summary(record))}"] if record.float32 else []
    return [
        f"range: {record.peak:.3g} at most ({record.where}), fp16 ends at {record.limit:,.0f}",
        *kept,
    ]


def _weights_lines(record: WeightsRecord) -> list[str]:
    """How weights are stored, and how far the model is from that of the checkpoint's weights."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(record.tensors.items()))
    own = f", {record.own} in the checkpoint's own codes" if record.own else ""
    own += f", {record.zero_points} with zero points" if record.zero_points else ""
    counted = "quantised or chosen" if record.kinds else "quantised"
    lines = [
        f"weights {record.format}: products {kinds}{own}; {record.bits:.2f} bits a weight where"
        f" {counted}, scales included; relative error {record.error:.2g} ({record.algorithm})"
    ]
    if record.distance is not None:
        lines.append(f"quantised beside the checkpoint's weights: {_distance(record.distance)}")
    if record.rounded is not None:
        lines.append(f"its activations rounded to 8 bits, eager: {_distance(record.rounded)}")
    if record.running is not None:
        lines.append(f"the same as it runs, activations rounded: {_distance(record.running)}")
    return lines


def _parity_lines(record: ParityRecord, dtype: str) -> list[str]:
    """What was compared with the eager model, and how far half precision is from float32."""
    if not record.samples:
        return [f"parity NOT checked: {record.why}"]
    copy = "" if record.eager is None else ", both in float32 with rounded weights"
    lines = [
        f"parity with the eager reference{copy}: {record.samples} samples, {record.ties} ties;"
        f" else the same kept tokens, visual tokens within {record.visual:.1e}, logits within"
        f" {record.logits:.1e}"
    ]
    if record.eager is not None:
        lines.append(f"{dtype} beside float32, eager: {_distance(record.eager)}")
    if record.graph is not None:
        lines.append(f"{dtype} beside float32, graph: {_distance(record.graph)}")
    elif record.eager is not None:
        lines.append(f"the {dtype} graph itself was not run: ONNX Runtime has no kernels for it")
    return lines


def _distance(record: DistanceRecord) -> str:
    shares = ", ".join(f"{name} {share:.3f}" for name, share in record.overlap.items())
    kept = f"kept tokens in common {shares}; " if shares else ""
    return (
        f"{kept}logits {record.logits:.1e} of their spread off, {record.tokens:.0%} of the next"
        " tokens equal"
    )
