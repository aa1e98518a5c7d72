"""Fine-tune a checkpoint with a pruning method in place, and see whether that helps.

    python -m benchmarks.finetune --model demo --method visiontrim --cr 8 -o out/tuned/visiontrim-8

Decoder and projector are trained (`--lora RANK`: a low-rank change of each product) on answers that
the pruned model gives; the encoder stays as it is. The forward is that of the modules which are
exported, so what is trained is what is exported: `edgeprune export --model out/tuned/visiontrim-8`
with the same method and ratio. State is saved every 50 steps, and a run that is started again goes
on from there. The demo is trained on scenes of its training split; `--samples-file` is a
LLaVA-Instruct file with answers. `--questions N` asks N held-out questions of the demo before and
after, greedily, and tells the paired difference with its 95% interval.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.finetune import merged
from benchmarks.finetune.examples import Encoder, Example, demo_examples, file_examples, held_out
from benchmarks.finetune.student import AnswerDecoder, Student, trainable, trained
from edgeprune.calib.calibrate import CalibrationRequest, calibrate
from edgeprune.errors import EdgepruneError, SpecError
from edgeprune.intervals import difference, wilson
from edgeprune.models import Adapter, open_model
from edgeprune.models._processor import Processor
from edgeprune.models._reference import Reference
from edgeprune.policies import Policy, make
from edgeprune.progress import Bar
from edgeprune.spec import Plan, PruneSpec, check_cr

STATE = "state.pt"


@dataclass(frozen=True)
class Cut:
    """A method at a ratio, for one model."""

    adapter: Adapter
    policy: Policy
    plan: Plan


def cut(args: argparse.Namespace) -> Cut:
    """The method's plan; its schedule, where it has one, is calibrated on the model as it is."""
    adapter = open_model(args.model, tokenizer=args.tokenizer)
    merged.check(adapter)
    options = dict(text.split("=", 1) for text in args.set)
    spec = PruneSpec(args.method, args.cr, seed=args.seed, options=options)
    policy, schedule = make(spec), None
    if policy.entry_tokens(adapter.shape, spec.cr) is not None:
        images = args.image_dir or (args.samples_file.parent if args.samples_file else None)
        request = CalibrationRequest(spec.cr, args.samples, args.samples_file, images)
        with Bar() as bar:
            schedule = calibrate(request, adapter, policy, Processor(adapter), bar)
    plan = policy.plan(adapter.shape, spec.cr, schedule)
    check_cr(plan, spec.cr)
    return Cut(adapter, policy, plan)


def train(args: argparse.Namespace, made: Cut, encode: Encoder) -> Path:
    """The tuned checkpoint."""
    folder = args.output.with_name(f"{args.output.name}-run")
    folder.mkdir(parents=True, exist_ok=True)
    student = Student.build(made.adapter, made.policy, made.plan, decoder=AnswerDecoder)
    names = {part: list(_names(part)) for part in (student.vision, student.decoder)}
    torch.manual_seed(args.seed)
    parameters = trainable(student, args.lora)
    optimizer = torch.optim.AdamW(parameters.values(), lr=args.rate, weight_decay=0.0)
    step = _resume(folder / STATE, parameters, optimizer)
    examples, began = source(args, step * args.batch), time.perf_counter()
    while step < args.steps:
        for group in optimizer.param_groups:
            group["lr"] = args.rate * _schedule(step, args.steps)
        total = 0.0
        for example in islice(examples, args.batch):
            loss = student.loss(encode(example)) / args.batch
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 10 == 0 or step == args.steps:
            took = time.perf_counter() - began
            print(f"step {step}/{args.steps}, loss {total:.4f}, {took:.0f} s", flush=True)
        if step % 50 == 0 or step == args.steps:
            _save(folder / STATE, step, parameters, optimizer)
    changed = {part: trained(part, iter(own)) for part, own in names.items()}
    return merged.write(made.adapter, changed, args.output)


def _names(part: nn.Module) -> Iterator[str]:
    """Parameters of a module that may have been trained, as they are called before."""
    trains = ("projector.", "layers.", "norm.")
    return (name for name, _ in part.named_parameters() if name.startswith(trains))


def _schedule(step: int, steps: int) -> float:
    """Up over a twentieth of the steps, then down along a cosine."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def source(args: argparse.Namespace, first: int) -> Iterator[Example]:
    """What is trained on, from an example on."""
    if args.samples_file is None:
        if args.model != "demo" and not args.demo_scenes:
            raise SpecError("give images, questions and answers with --samples-file")
        return demo_examples(first)
    images = args.image_dir or args.samples_file.parent
    return file_examples(args.samples_file, images, first)


def _save(file: Path, step: int, parameters: dict[str, nn.Parameter], optimizer: Any) -> None:
    held = {name: parameter.detach() for name, parameter in parameters.items()}
    draft = file.with_suffix(".draft")
    torch.save({"step": step, "held": held, "optimizer": optimizer.state_dict()}, draft)
    draft.replace(file)


def _resume(file: Path, parameters: dict[str, nn.Parameter], optimizer: Any) -> int:
    if not file.is_file():
        return 0
    state = torch.load(file, weights_only=True)
    for name, parameter in parameters.items():
        parameter.data.copy_(state["held"][name])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def marks(made: Cut, count: int) -> str:
    """1 for each of the demo's held-out questions that is answered right, else 0."""
    reference = Reference.build(made.adapter, made.policy, made.plan)
    encode, found = Encoder(made.adapter), ""
    for example in held_out(count):
        encoded = encode(example)
        ids = reference.generate(encoded.prompt, 4, lambda token: token in encode.ends)
        found += str(int(encode.text(ids) == example.answer))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune with pruning in place.")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--method", default="visiontrim")
    parser.add_argument("--cr", type=float, default=8)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=100, help="of a calibration, for utp")
    parser.add_argument("--samples-file", type=Path, help="LLaVA-Instruct with answers")
    parser.add_argument("--image-dir", type=Path)
    parser.add_argument("--demo-scenes", action="store_true", help="for a copy of the demo model")
    parser.add_argument("--lora", type=int, metavar="RANK", help="default: all weights")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--questions", type=int, default=0, help="of the demo, before and after")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        made = cut(args)
        encode, began = Encoder(made.adapter), time.perf_counter()
        before = marks(made, args.questions)
        tuned = Cut(open_model(str(train(args, made, encode))), made.policy, made.plan)
        after = marks(tuned, args.questions)
    except EdgepruneError as error:
        parser.exit(2, f"{error}\n")
    print(args.output)
    if before:
        result = {"method": args.method, "cr": args.cr, "before": before, "after": after}
        result |= {"steps": args.steps, "batch": args.batch, "lora": args.lora, "rate": args.rate}
        args.output.with_name(f"{args.output.name}.json").write_text(json.dumps(result))
        print(told(args.method, args.cr, before, after, time.perf_counter() - began))


def told(method: str, cr: float, before: str, after: str, seconds: float) -> str:
    """A row: shares with half of their intervals, and the paired difference, in percent."""
    cells = list[str]()
    for found in (before, after):
        low, high = wilson(found.count("1"), len(found))
        cells.append(f"{100 * found.count('1') / len(found):.1f} ± {50 * (high - low):.1f}")
    gain, half = difference(after, before)
    cells.append(f"{100 * gain:+.1f} ± {100 * half:.1f}")
    return f"| {method} | {cr:g} | {' | '.join(cells)} | {len(before):,} | {seconds:.0f} s |"


if __name__ == "__main__":
    main()
