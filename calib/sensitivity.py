"""How much each group of products loses where it alone has 4 bits, and the best mixture.

The loss is the divergence KL(float || quantised) of the next token's distribution, over the last
tokens of calibration samples: the first of their answers, where the samples have some. A group is
the products that read one tensor. The loss of 8 bits is too small to be measured: it is
taken as the loss of 4 bits times the ratio of the squared errors of the weights.

The model is read layer by layer, once. Behind the layer that has a group only the last tokens of
the text go on; what they see of earlier tokens in later layers is the float model's. So a group
costs one layer of a prefill, not all that follow, and no whole model is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from edgeprune.calib.divergence import Divergences
from edgeprune.calib.mixed import Candidate, choose
from edgeprune.calib.open_products import OpenProducts
from edgeprune.models import Adapter
from edgeprune.models._decoder import Decoder, Flow
from edgeprune.models._execution import CPU
from edgeprune.models._layerwise import Layerwise
from edgeprune.models._memory import check_memory, sensitivity_bytes
from edgeprune.models._ops import capped
from edgeprune.models._processor import Prompt
from edgeprune.models._quantised import QuantizedWeight, Strip
from edgeprune.models._tuning import UNTUNED, Tuning
from edgeprune.models._weight_plan import HEAD
from edgeprune.models._weight_source import Source
from edgeprune.policies import Policy
from edgeprune.progress import Progress, silent
from edgeprune.spec import Plan
from edgeprune.weight_format import WeightFormat

ANSWER = 8
"""Tokens at the end of a sample behind which distributions are compared."""
CARRIED = 64
"""Of them and those before them, how many go on at most where a group has 4 bits; text alone."""


@torch.no_grad()
def mix(
    adapter: Adapter,  # with the checkpoint's own weights
    wanted: WeightFormat,
    scales: torch.dtype,
    policy: Policy,
    plan: Plan,
    prompts: Sequence[Prompt],
    tuning: Tuning = UNTUNED,
    report: Progress = silent,
    *,
    fused: bool = False,
) -> dict[str, str]:
    """The kind of each product whose kind is left open: float, int8 or int4.

    Open are those that int4 can hold. All that is quantised or may be has `wanted.bits` a weight at
    most, scales included; `fused` says that products are MatMulNBits. SpecError where no choice has
    so few.
    """
    four, eight = _settled(adapter, wanted, scales, tuning, fused=fused)
    found = OpenProducts.of(four, eight, scales.itemsize, fused=fused)
    budget = found.budget(wanted.bits)
    need = sensitivity_bytes(adapter, len(prompts))
    check_memory(need, "--weights auto", "choose int8 or int4")
    model = Sensitivity(four, eight, policy, plan, found.groups)
    losses = model.losses(prompts, report)
    each = zip(found.groups, losses, found.bits, strict=True)
    kinds = choose([model.candidates(*one) for one in each], budget)
    return {name: kind for names, kind in zip(found.groups, kinds, strict=True) for name in names}


def check_budget(
    adapter: Adapter, wanted: WeightFormat, scales: torch.dtype, *, fused: bool = False
) -> None:
    """SpecError, before anything is measured, where `mix` would find no choice."""
    both = _settled(adapter, wanted, scales, UNTUNED, fused=fused)
    OpenProducts.of(*both, scales.itemsize, fused=fused).budget(wanted.bits)


def _settled(
    adapter: Adapter, wanted: WeightFormat, scales: torch.dtype, tuning: Tuning, *, fused: bool
) -> tuple[Adapter, Adapter]:
    """The checkpoint with the open products in 4 bits, and with them in 8."""
    four, eight = (
        adapter.with_weights(wanted.settled(kind), scales, tuning, zero_points=fused)
        for kind in ("int4", "int8")
    )
    return four, eight


@dataclass(frozen=True)
class _Run:
    """One sample between two layers: the float model, and the last tokens where one group has 4
    bits, for each group of the layers so far."""

    flow: Flow
    changed: Tensor  # [groups, CARRIED or fewer, width]


class Sensitivity:
    """A model of floats in which one group of products at a time has 4 bits."""

    def __init__(
        self,
        four: Adapter,
        eight: Adapter,
        policy: Policy,
        plan: Plan,
        groups: Sequence[Sequence[str]],
    ) -> None:
        """`four` and `eight` have the products of the groups in 4 and in 8 bits."""
        self._four, self._eight, self._groups = four, eight, groups
        empty = four.empty_modules()[1]
        self._sources = four.sources(empty), eight.sources(empty)
        self._policy, self._plan = policy, plan
        self._errors = dict[str, float]()  # of 4 bits, sums of squares
        self._layer, self._codes = -1, dict[str, QuantizedWeight]()  # of the layer in memory

    def losses(self, prompts: Sequence[Prompt], report: Progress = silent) -> list[float]:
        """What each group loses in 4 bits: the mean over the samples."""
        tick = partial(report, "sensitivity")
        engine = Layerwise(self._four.in_floats(), self._policy, self._plan, tick)
        width = engine.decoder.config.width
        runs = engine.keep(
            _Run(started.flow, torch.empty(0, min(CARRIED, started.flow.segments.text), width))
            for started in engine.start(prompts)
        )
        runs = engine.layers(runs, partial(self._advance, engine))
        norm, normed = engine.decoder.norm, list[tuple[Tensor, Tensor]]()
        compute = engine.execution.run
        for run in engine.normed(runs.drain()):
            count = min(ANSWER, run.flow.segments.text)
            last, changed = run.flow.hidden[0, -count:], run.changed[:, -count:]
            normed.append((compute(norm, last), compute(norm, changed)))
        found = torch.stack([one.mean() for one in self._divergences(engine.decoder, normed)])
        return [float(loss) for loss in found.mean(0)]

    def candidates(
        self, names: Sequence[str], loss: float, bits: Mapping[str, float]
    ) -> dict[str, Candidate]:
        """What a group loses in each kind that takes some bits, once losses are known."""
        coarse = sum(self._errors[name] for name in names)
        strips = self._eight.reader.strips
        fine = sum(s.error for name in names for s in strips(self._sources[1][name]))
        lost = {"int4": loss, "int8": loss * (fine / coarse if coarse else 0.0), "float": 0.0}
        return {kind: Candidate(lost[kind], taken) for kind, taken in bits.items()}

    def _advance(self, engine: Layerwise, index: int, run: _Run) -> _Run:
        """One sample through the layer in memory, as it is and with each of its groups in 4
        bits."""
        groups = [names for names in self._groups if names[0].startswith(f"layers.{index}.")]
        if index != self._layer:
            self._layer = index
            with CPU:  # where weights are read
                self._codes = {name: self._quantised(name) for names in groups for name in names}
        done, carried = engine.advance(index, run.flow), run.changed.shape[1]
        changed = [engine.resumed(index, run.changed, run.flow, done.cache)]
        for names in groups:
            with CPU:
                floats = {name: self._codes[name].dequantised() for name in names}
            with _replaced(engine.decoder, engine.execution.send, floats):
                changed.append(engine.advance(index, run.flow).flow.hidden[:, -carried:])
        return _Run(done.flow, torch.cat(changed))

    def _quantised(self, name: str) -> QuantizedWeight:
        """A product's weight in 4 bits; the squared error of that is noted."""
        strips = list(self._four.reader.strips(self._sources[0][name]))
        self._errors[name] = sum(strip.error for strip in strips)
        return QuantizedWeight.joined([strip.weight for strip in strips])

    def _divergences(
        self, decoder: Decoder, samples: Sequence[tuple[Tensor, Tensor]]
    ) -> list[Divergences]:
        """Of each sample, whose normed last tokens [R, width] are compared with changed ones [n, R,
        width]. The head's weight is read some tokens of the vocabulary at a time."""
        quantised = any(HEAD in names for names in self._groups)
        found = [Divergences(len(changed) + quantised, len(last)) for last, changed in samples]
        cap = decoder.config.cap
        for exact, strip in self._heads(decoder, quantised):
            for one, (last, changed) in zip(found, samples, strict=True):
                wanted, logits = last @ exact, changed @ exact
                if strip is not None:
                    logits = torch.cat([logits, (last @ strip.weight.dequantised())[None]])

                if cap is not None:
                    wanted, logits = capped(wanted, cap), capped(logits, cap)
                one.add(wanted, logits)
        return found

    def _heads(self, decoder: Decoder, quantised: bool) -> Iterator[tuple[Tensor, Strip | None]]:
        """The head's weight [width, n], some outputs at a time, and the same in 4 bits if asked."""
        source = self._head(decoder)
        if not quantised:
            yield from ((exact, None) for _, exact in self._four.reader.floats(source))
            return
        self._errors[HEAD] = 0.0
        reader = self._four.reader
        pairs = zip(reader.floats(source), reader.strips(source), strict=True)
        for (_, exact), strip in pairs:
            self._errors[HEAD] += strip.error
            yield exact, strip

    def _head(self, decoder: Decoder) -> Source:
        """Where the head's weight is: by itself, or in the embedding."""
        sources: Mapping[str, Source] = self._sources[0]
        return sources.get(HEAD) or sources["embedding.weight"]


@contextmanager
def _replaced(
    module: nn.Module, send: Callable[[Tensor], Tensor], weights: Mapping[str, Tensor]
) -> Iterator[None]:
    """While this is open, parameters have other values, where the module computes."""
    owners = {name: module.get_submodule(name.rpartition(".")[0]) for name in weights}
    exact = {name: module.get_parameter(name) for name in weights}
    try:
        for name, weight in weights.items():
            owners[name].weight = nn.Parameter(send(weight), requires_grad=False)
        yield
    finally:
        for name, parameter in exact.items():
            owners[name].weight = parameter
