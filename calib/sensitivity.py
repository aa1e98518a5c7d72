"""How much each group of products loses where it alone has 4 bits, and the best mixture.

The loss is the divergence KL(float || quantised) of the next token's distribution, over the first
tokens of the float model's answers to calibration samples. A group is the products that read one
tensor. What 8 bits lose is not measured, it is too little: it is taken as the loss of 4 bits times
the ratio of the squared errors of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edgeprune.calib.awq import groups_of
from edgeprune.calib.mixed import Candidate, choose
from edgeprune.errors import SpecError
from edgeprune.models import Adapter
from edgeprune.models._decoder import Decoder
from edgeprune.models._memory import check_memory, needed_bytes
from edgeprune.models._processor import Prompt
from edgeprune.models._reference import Reference
from edgeprune.models._tuning import UNTUNED, Tuning
from edgeprune.models._weight_plan import HEAD
from edgeprune.policies import Policy
from edgeprune.progress import Progress, silent
from edgeprune.spec import Plan
from edgeprune.weight_format import WeightFormat

ANSWER = 8
"""Tokens of an answer whose distributions are compared."""


class _Watching(Decoder):
    """Keeps the logits of the last tokens of a call: [1, ANSWER, vocabulary] or fewer."""

    seen: Tensor

    def logits(self, hidden: Tensor) -> Tensor:
        total = hidden.shape[1]
        rows = [
            super(_Watching, self).logits(hidden[:, :end])
            for end in range(max(1, total - ANSWER + 1), total + 1)
        ]
        self.seen = torch.cat(rows, dim=1)
        return rows[-1]


@dataclass(frozen=True)
class _Sample:
    """A prompt with the float model's answer, and its distributions before each of its tokens."""

    prompt: Prompt
    wanted: Tensor  # log probabilities [ANSWER, vocabulary]


def mix(
    adapter: Adapter,  # with the checkpoint's own weights
    wanted: WeightFormat,
    scales: torch.dtype,
    policy: Policy,
    plan: Plan,
    prompts: Sequence[Prompt],
    tuning: Tuning = UNTUNED,
    report: Progress = silent,
) -> dict[str, str]:
    """The kind of each product whose kind is left open: float, int8 or int4.

    Open are those that int4 can hold; together they have `wanted.bits` a weight at most, scales
    included. SpecError where that is less than int4 takes.
    """
    check_memory(needed_bytes(adapter), "--weights auto", "choose int8 or int4")
    settled = (wanted.settled(kind) for kind in ("int4", "int8"))
    four, eight = (adapter.with_weights(one, scales, tuning) for one in settled)
    measured = _Measured(four, eight, policy, plan, scales.itemsize)
    groups = [
        names
        for group in groups_of(adapter.decoder_config)
        if (names := [name for name in group.products if name in measured.open])
    ]
    samples = [measured.sample(prompt) for prompt in prompts]
    candidates = list[dict[str, Candidate]]()
    for number, names in enumerate(groups, 1):
        candidates.append(measured.candidates(names, samples))
        report("sensitivity", number, len(groups))
    numbers = sum(math.prod(measured.sizes[name]) for names in groups for name in names)
    least = sum(min(one.bits for one in group.values()) for group in candidates) / numbers
    if least > wanted.bits:
        raise SpecError(
            f"--weights auto:bits={wanted.bits:g} is less than 4 bits take with their scales,"
            f" {least:.3f} a weight here; give more, or a larger block"
        )
    kinds = choose(candidates, wanted.bits * numbers)
    return {name: kind for names, kind in zip(groups, kinds, strict=True) for name in names}


class _Measured:
    """A model of floats in which some products are quantised for a while."""

    def __init__(
        self, four: Adapter, eight: Adapter, policy: Policy, plan: Plan, element: int
    ) -> None:
        assert four.weights is not None and eight.weights is not None
        self.four, self.eight, self.element = four, eight, element
        self.sizes, forms = four.weights.sizes, (four.weights.forms, eight.weights.forms)
        self.open = {name for name, form in forms[0].items() if form != forms[1].get(name)}
        self.forms = {"int4": forms[0], "int8": forms[1]}
        self.model = Reference.build(four, policy, plan, decoder=_Watching)
        self.sources = four.sources(self.model.decoder), eight.sources(self.model.decoder)
        self._restore(self.open)

    def sample(self, prompt: Prompt) -> _Sample:
        """A prompt with the answer of the model as it is, in floats."""
        answer = self.model.generate(prompt, ANSWER, lambda token: False)
        text = torch.cat([prompt.text_ids, torch.tensor([answer[:-1]])], dim=1)
        prompt = replace(prompt, text_ids=text)
        return _Sample(prompt, self._distributions(prompt))

    def candidates(self, names: Sequence[str], samples: Sequence[_Sample]) -> dict[str, Candidate]:
        """What a group loses in each kind, and the bits that it takes."""
        coarse = sum(map(self._quantise, names))
        pairs = ((one.wanted, self._distributions(one.prompt)) for one in samples)
        losses = [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in pairs]
        self._restore(names)
        fine = sum(s.error for name in names for s in self.eight.strips(self.sources[1][name]))
        loss = sum(losses) / len(losses)
        ratio = fine / coarse if coarse else 0.0
        floats = 8.0 * self.element * sum(math.prod(self.sizes[name]) for name in names)
        found = {
            "int4": Candidate(loss, self._bits(names, "int4")),
            "int8": Candidate(loss * ratio, self._bits(names, "int8")),
        }
        # The head of floats may be the embedding's tensor, which is not scaled.
        return found if HEAD in names else found | {"float": Candidate(0.0, floats)}

    def _bits(self, names: Sequence[str], kind: str) -> float:
        forms = ((self.forms[kind][name], self.sizes[name]) for name in names)
        return sum(8.0 * form.bytes(*size, self.element) for form, size in forms)

    def _distributions(self, prompt: Prompt) -> Tensor:
        """Log probabilities of the last tokens."""
        self.model.prefill(prompt)
        decoder = self.model.decoder
        assert isinstance(decoder, _Watching)
        return decoder.seen[0].float().log_softmax(-1)

    def _weight(self, name: str) -> Tensor:
        return self.model.decoder.get_parameter(name).data

    def _quantise(self, name: str) -> float:
        """Give a product its codes' values; the squared error of that."""
        weight, error = self._weight(name), 0.0
        for strip in self.four.strips(self.sources[0][name]):
            weight[:, strip.outputs] = strip.weight.dequantised()
            error += strip.error
        return error

    def _restore(self, names: Collection[str]) -> None:
        for name in names:
            for outputs, exact in self.four.floats(self.sources[0][name]):
                self._weight(name)[:, outputs] = exact
