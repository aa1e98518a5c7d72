"""What a model loses by the format of its weights: next-token divergence, agreement, perplexity.

Each format is compared with the float model on prompts that it was not tuned on: the demo's
questions with the float model's own answers, or English prose (`--text`, for a checkpoint with a
real language model, such as benchmarks/real_lm.py writes). Runs the eager model, whose weights are
those of the bundle, and whose activations are rounded where `activations=on`: what ONNX Runtime's
own rounding adds to products of other formats is not in these numbers.

    python -m benchmarks.weights_quality --weights int8,int4:clip=off,int4,int4:awq=on,auto:bits=5
    python -m benchmarks.weights_quality --model checkpoints/smollm2-llava --text --tests 16
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pydoc_data.topics import topics

import torch
from torch import Tensor
from torch.nn import functional as F

from edgeprune.calib import awq, gptq, sensitivity, smoothing
from edgeprune.calib.samples import demo_samples
from edgeprune.demo.questions import calibration_samples
from edgeprune.lowering import Lowering, resolve
from edgeprune.models import Adapter, open_model
from edgeprune.models._decoder import Decoder
from edgeprune.models._processor import Processor, Prompt
from edgeprune.models._reference import Reference
from edgeprune.models._rounded_inputs import round_inputs
from edgeprune.models._tuning import UNTUNED
from edgeprune.policies import make
from edgeprune.spec import Plan, PruneSpec
from edgeprune.weight_format import AUTO, GPTQ

FORMATS = "int8,int4:clip=off,int4,int4:awq=on:clip=off,int4:awq=on,auto:bits=5,auto:bits=5:awq=on"
POLICY = make(PruneSpec("none"))
ANSWER = 6
PASSAGE = 192
"""Tokens of an answer, and of a passage of prose."""


class Everywhere(Decoder):
    """Logits after every token, not after the last alone."""

    seen: Tensor  # [S, vocabulary]

    def logits(self, hidden: Tensor) -> Tensor:
        states = self.norm(hidden)[0]
        if self.config.head_apart:
            self.seen = self.head(states)
        else:
            weight = self.embedding.weight if self.config.tied else self.head.weight
            self.seen = self.ops.linear(states, weight, transposed=True)
        return self.seen[None, -1:]


@dataclass(frozen=True)
class Case:
    """A prompt, and the tokens at its end whose probabilities are compared."""

    prompt: Prompt
    compared: Tensor  # int64 [n], the last of the prompt's text


def passages(processor: Processor) -> Iterator[Case]:
    """Prose behind a generated scene."""
    long = sorted(text for text in topics.values() if len(text) > 8 * PASSAGE)
    random.Random(0).shuffle(long)
    for text, (image, _) in zip(long, calibration_samples(len(long)), strict=True):
        prompt = processor(image, text)
        ids = prompt.text_ids[:, :PASSAGE]
        yield Case(replace(prompt, text_ids=ids), ids[0, 8:])


def questions(processor: Processor, model: Reference, count: int) -> Iterator[Case]:
    """The demo's questions with the float model's answers."""
    for sample in demo_samples(processor, count):
        answer = model.generate(sample.prompt, ANSWER, lambda token: False)
        ids = torch.tensor(answer)
        text = torch.cat([sample.prompt.text_ids, ids[None]], 1)
        yield Case(replace(sample.prompt, text_ids=text), ids)


def distributions(model: Reference, case: Case) -> Tensor:
    """Log probabilities before each compared token: [n, vocabulary]."""
    model.prefill(case.prompt)
    decoder = model.decoder
    assert isinstance(decoder, Everywhere)
    return decoder.seen[-1 - len(case.compared) : -1].float().log_softmax(-1)


def prepared(adapter: Adapter, lowering: Lowering, plan: Plan, prompts: list[Prompt]) -> Adapter:
    """A checkpoint with weights in a format, as `export` has it; scales are of fp16."""
    tuning, wanted = UNTUNED, lowering.weights
    if wanted.awq:
        four = adapter.with_weights(wanted.settled("int4"), torch.float16)
        tuning = awq.tune(four, POLICY, plan, prompts)
    if wanted.kind == AUTO:
        few = prompts[:4]
        kinds = sensitivity.mix(adapter, wanted, torch.float16, POLICY, plan, few, tuning)
        tuning = replace(tuning, kinds=kinds)
    if wanted.round == GPTQ:
        four = adapter.with_weights(wanted, torch.float16, tuning)
        tuning = gptq.tune(four, POLICY, plan, prompts)
    if wanted.activations:
        how = {"smooth": wanted.smooth, "calibrated": lowering.calibrated}
        rounded = adapter.with_weights(wanted, torch.float16)
        tuning = smoothing.tune(rounded, POLICY, plan, prompts, **how)
    largest = lowering.target.largest_code
    return adapter.with_weights(wanted, torch.float16, tuning, largest=largest)


def size_and_error(adapter: Adapter, model: Reference) -> tuple[float, float]:
    """Bits a quantised weight, scales of fp16 included, and the relative error of these weights."""
    assert adapter.weights is not None
    sources = adapter.sources(model.vision) | adapter.sources(model.decoder)
    forms, sizes = adapter.weights.forms, adapter.weights.sizes
    size = sum(form.bytes(*sizes[name], 2) for name, form in forms.items())
    strips = [strip for name in forms for strip in adapter.reader.strips(sources[name])]
    error, power = sum(strip.error for strip in strips), sum(strip.power for strip in strips)
    return 8 * size / sum(map(math.prod, sizes.values())), math.sqrt(error / power)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--weights", default=FORMATS, help="formats, with commas between them")
    parser.add_argument("--target", default="cpu", help="decides how activations are rounded")
    parser.add_argument(
        "--text", action="store_true", help="prose in place of the demo's questions"
    )
    parser.add_argument("--samples", type=int, default=16, help="prompts to tune on")
    parser.add_argument("--tests", type=int, default=48, help="prompts to compare on")
    args = parser.parse_args()
    adapter = open_model(args.model)
    plan, processor = Plan(adapter.shape.visual_tokens, adapter.shape.layers), Processor(adapter)
    model = Reference.build(adapter, POLICY, plan, decoder=Everywhere)
    count = args.samples + args.tests
    found = passages(processor) if args.text else questions(processor, model, count)
    cases = [case for case, _ in zip(found, range(count), strict=False)]
    tuned, tests = [case.prompt for case in cases[: args.samples]], cases[args.samples :]
    wanted = [distributions(model, case) for case in tests]
    rows = sum(map(len, wanted))
    nll = sum(_nll(said, case) for said, case in zip(wanted, tests, strict=True)) / rows
    print(f"{rows} tokens of {len(tests)} prompts; float: perplexity {math.exp(nll):.3f}")
    print("| --weights | bits | weight error | KL | agreement | perplexity |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    del model
    for text in args.weights.split(","):
        quantised = prepared(adapter, resolve(args.target, weights=text), plan, tuned)
        model = Reference.build(quantised, POLICY, plan, decoder=Everywhere)
        if quantised.weights is not None:
            round_inputs(quantised.weights, model.vision, model.decoder)
        bits, error = size_and_error(quantised, model)
        kl = equal = nll = 0.0
        for case, float32 in zip(tests, wanted, strict=True):
            said = distributions(model, case)
            kl += float(F.kl_div(said, float32, log_target=True, reduction="sum"))
            equal += float((said.argmax(-1) == float32.argmax(-1)).sum())
            nll += _nll(said, case)
        cells = f"{kl / rows:.4f} | {equal / rows:.1%} | {math.exp(nll / rows):.3f}"
        print(f"| {text} | {bits:.2f} | {error:.4f} | {cells} |", flush=True)


def _nll(said: Tensor, case: Case) -> float:
    return float(F.nll_loss(said, case.compared, reduction="sum"))


if __name__ == "__main__":
    main()
