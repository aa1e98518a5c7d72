"""Codes of 4 bits, chosen input by input (GPTQ, arXiv:2210.17323).

Rounding the weights of one input changes the outputs. The weights of later inputs compensate this
change, as far as the inputs are correlated in the samples.

Scales are fixed first, as `clip` says, by the sizes of the inputs; so graphs and their sizes are as
without. Inputs are the float model's, read layer by layer. Codes lie in a file without a name, a
byte a weight. Products of the decoder's layers alone are rounded so. The head reads one token of a
sample, which is too little to estimate correlations.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import IO

import numpy as np
import torch
from torch import Tensor, nn

from edgeprune.errors import ModelError
from edgeprune.models import Adapter
from edgeprune.models._decoder import Flow
from edgeprune.models._layers import Linear
from edgeprune.models._layerwise import Layerwise
from edgeprune.models._memory import check_memory, layerwise_bytes
from edgeprune.models._processor import Prompt
from edgeprune.models._quantised import QuantizedWeight, codes_of, quantize
from edgeprune.models._tuning import Tuning
from edgeprune.models._weight_source import Source
from edgeprune.policies import Policy
from edgeprune.progress import Progress, silent
from edgeprune.spec import Plan

DAMPING = 0.01
"""Of the mean diagonal of a Hessian, added to it."""
MOST_INPUTS = 11_585
"""Of a product, so that its Hessian has half a gigabyte; those with more are rounded to nearest."""
COPIES = 4
"""Of the largest Hessian, in memory while it is turned."""
PANEL = 128
"""Inputs whose errors are taken out of those to come at once."""
SHARED = {"key": "query", "value": "query", "up": "gate"}
"""Products that read what another one reads."""


@torch.no_grad()
def tune(
    adapter: Adapter,
    policy: Policy,
    plan: Plan,
    prompts: Sequence[Prompt],
    report: Progress = silent,
) -> Tuning:
    """`adapter`'s tuning with codes for products of the decoder's layers that have 4 bits.

    ModelError where the checkpoint's weights are quantised already, or memory is not there.
    """
    assert adapter.weights is not None
    if adapter.checkpoint.packed is not None:
        raise ModelError(
            "round=gptq needs the floats of a checkpoint, and this one's weights are quantised"
            f" ({adapter.checkpoint.packed}); leave it out"
        )
    with tempfile.TemporaryFile(prefix="edgeprune-") as file:  # lives on while codes are mapped
        return _tuned(adapter, _Rounding(adapter, file), policy, plan, prompts, report)


def _tuned(
    adapter: Adapter,
    rounding: _Rounding,
    policy: Policy,
    plan: Plan,
    prompts: Sequence[Prompt],
    report: Progress,
) -> Tuning:
    need = layerwise_bytes(adapter, len(prompts)) + COPIES * 4 * rounding.most_inputs**2
    check_memory(need, "round=gptq", "leave it out")
    engine = Layerwise(adapter.in_floats(), policy, plan, partial(report, "GPTQ"))
    flows = engine.keep(started.flow for started in engine.start(prompts))

    def step(index: int, flow: Flow) -> Flow:
        rounding.enter(index)
        with _listening(engine.decoder.layers[index], f"layers.{index}.", rounding):
            return engine.advance(index, flow).flow

    engine.layers(flows, step).close()
    rounding.enter(len(engine.decoder.layers))
    assert adapter.weights is not None
    return replace(adapter.weights.tuning, codes=rounding.codes, left=tuple(rounding.left))


class _Rounding:
    """Sums of the layer that samples go through, and the codes of the layers before it."""

    def __init__(self, adapter: Adapter, file: IO[bytes]) -> None:
        assert adapter.weights is not None
        self._adapter, self._weights = adapter, adapter.weights
        self._sources = adapter.sources(adapter.empty_modules()[1])
        forms = adapter.weights.forms
        four = [name for name in self._sources if name in forms and forms[name].bits == 4]
        inner = [name for name in four if name.startswith("layers.")]
        self.names = [name for name in inner if self._inputs(name) <= MOST_INPUTS]
        self.left = [name for name in inner if self._inputs(name) > MOST_INPUTS]
        self.most_inputs = max(map(self._inputs, self.names), default=0)
        self.codes = dict[str, QuantizedWeight]()
        self._layer, self._sums = -1, dict[str, Tensor]()  # x^T x [K, K], by who reads x
        self._file = file

    def _inputs(self, name: str) -> int:
        return self._weights.sizes[name][0]

    def add(self, name: str, x: Tensor) -> None:
        """Count what goes into a product."""
        if name not in self.names or _reader(name) != name:
            return
        rows = x.reshape(-1, x.shape[-1]).float()
        if name not in self._sums:
            self._sums[name] = torch.zeros(rows.shape[1], rows.shape[1])
        self._sums[name].addmm_(rows.t(), rows)

    def enter(self, index: int) -> None:
        """Round the products of the layer before, if samples have been through it."""
        if index == self._layer:
            return
        for reader in list(self._sums):
            total = self._sums.pop(reader)
            squares, turned = total.diagonal().clone(), inverse_factor(total)
            for name in self.names:
                if name.startswith(f"layers.{self._layer}.") and _reader(name) == reader:
                    self.codes[name] = self._kept(self._rounded(name, squares, turned))
        self._layer = index

    def _rounded(self, name: str, squares: Tensor, turned: Tensor) -> QuantizedWeight:
        source: Source = self._sources[name]
        form = self._weights.forms[name]
        assert form.block is not None
        parts = list[QuantizedWeight]()
        for _, weight in self._adapter.reader.floats(source):
            how = {"clip": self._weights.clip, "importance": squares}
            found = quantize(weight, 4, form.block, self._weights.scales, **how)  # type: ignore[arg-type]
            parts.append(replace(found, codes=compensated(weight, found, turned)))
        return QuantizedWeight.joined(parts)

    def _kept(self, weight: QuantizedWeight) -> QuantizedWeight:
        """The same with its codes in the file."""
        codes = weight.codes.numpy()
        start = self._file.seek(0, 2)
        self._file.write(codes.tobytes())
        self._file.flush()
        held = np.memmap(self._file, np.int8, "r+", start, codes.shape)
        return replace(weight, codes=torch.from_numpy(held))


def inverse_factor(total: Tensor) -> Tensor:
    """U, upper, with U^T U the inverse of a damped Hessian [K, K]; inputs that were always 0 stand
    by themselves. The Hessian is used up."""
    diagonal = total.diagonal()
    diagonal.masked_fill_(diagonal == 0, 1)
    diagonal += DAMPING * float(diagonal.mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(total))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def compensated(weight: Tensor, found: QuantizedWeight, turned: Tensor) -> Tensor:
    """Codes int8 [K, N] of a weight with the scales that were `found` for it."""
    rest, codes = weight.clone(), torch.empty_like(found.codes)
    for start in range(0, len(weight), PANEL):
        end = min(start + PANEL, len(weight))
        errors = torch.empty(end - start, weight.shape[1])
        for row in range(start, end):
            scales = found.scales[row // found.block]
            chosen = codes_of(rest[row], scales, 2 ** (found.bits - 1) - 1)
            error = (rest[row] - chosen * scales) / turned[row, row]
            rest[row + 1 : end].addr_(turned[row, row + 1 : end], error, alpha=-1)
            codes[row], errors[row - start] = chosen.to(torch.int8), error
        rest[end:].addmm_(turned[start:end, end:].t(), errors, alpha=-1)
    return codes


def _reader(name: str) -> str:
    """The product whose inputs are counted for a product."""
    return re.sub(r"(key|value|up)(?=\.weight$)", lambda match: SHARED[match[0]], name)


@contextmanager
def _listening(layer: nn.Module, path: str, rounding: _Rounding) -> Iterator[None]:
    """While this is open, what goes into the products of a layer is counted."""
    handles = [
        one.register_forward_pre_hook(
            lambda module, inputs, name=f"{path}{name}.weight": rounding.add(name, inputs[0])
        )
        for name, one in layer.named_modules()
        if isinstance(one, Linear)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
