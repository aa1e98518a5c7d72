"""How large the inputs of products are, channel by channel, over calibration samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.models import Adapter
from edgeprune.models._decoder import Decoder
from edgeprune.models._layers import Linear
from edgeprune.models._layerwise import Layerwise
from edgeprune.models._processor import Prompt
from edgeprune.models._tuning import Fold
from edgeprune.models._weight_plan import HEAD
from edgeprune.policies import Policy
from edgeprune.progress import Progress
from edgeprune.spec import Plan


@dataclass
class Moments:
    """Sums over the rows x [K] that went into a product."""

    absolute: Tensor | float = 0.0  # of |x|
    squared: Tensor | float = 0.0  # of x^2
    largest: Tensor | float = 0.0  # |x|, not a sum
    rows: int = 0

    def add(self, x: Tensor) -> None:
        """Count the rows of a tensor [..., K]."""
        rows = x.reshape(-1, x.shape[-1]).float()
        self.absolute = self.absolute + rows.abs().sum(0).cpu()
        self.squared = self.squared + rows.square().sum(0).cpu()
        if len(rows):
            largest = rows.abs().amax(0).cpu()
            self.largest = torch.maximum(largest, torch.as_tensor(self.largest, device="cpu"))
        self.rows += len(rows)

    @property
    def mean_absolute(self) -> Tensor:
        """Mean of |x|: [K]."""
        return self._mean(self.absolute)

    @property
    def mean_square(self) -> Tensor:
        """Mean of x^2: [K]."""
        return self._mean(self.squared)

    def _mean(self, total: Tensor | float) -> Tensor:
        assert isinstance(total, Tensor)  # as soon as there are rows
        return total / self.rows


@torch.no_grad()
def collect(
    adapter: Adapter, policy: Policy, plan: Plan, prompts: Sequence[Prompt], report: Progress
) -> dict[str, Moments]:
    """Moments of each product's inputs, by its weight's name, in the float32 model with a policy.

    Prompts are read layer by layer, so that the model need not fit in memory. The adapter's weights
    are the checkpoint's own. Products that nothing went into are left out.
    """
    tick = partial(report, "activations")
    engine, found = Layerwise(adapter, policy, plan, tick), dict[str, Moments]()
    with _listening(engine.vision, engine.decoder, found):
        flows = engine.keep(started.flow for started in engine.start(prompts))
        flows = engine.layers(flows, lambda index, flow: engine.advance(index, flow).flow)
        for flow in engine.normed(flows.drain()):
            engine.execution.run(engine.decoder.norm, flow.hidden[:, -1:])
    return {name: moments for name, moments in found.items() if moments.rows}


def peaks(moments: Mapping[str, Moments], folds: Mapping[str, Fold]) -> dict[str, float]:
    """The largest input of each product, after its folds."""
    found = dict[str, float]()
    for name, one in moments.items():
        inputs = folds.get(name, Fold()).inputs
        largest = torch.as_tensor(one.largest)
        found[name] = float((largest if inputs is None else largest / inputs).max())
    return found


@contextmanager
def _listening(vision: nn.Module, decoder: Decoder, found: dict[str, Moments]) -> Iterator[None]:
    """While this is open, what goes into products is counted."""
    handles = [decoder.norm.register_forward_hook(_output(found.setdefault(HEAD, Moments())))]
    for module in (vision, decoder):
        for path, one in module.named_modules():
            if isinstance(one, Linear):
                moments = found.setdefault(f"{path}.weight", Moments())
                handles.append(one.register_forward_pre_hook(_input(moments)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input(moments: Moments) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    return lambda module, inputs: moments.add(inputs[0])


def _output(moments: Moments) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    return lambda module, inputs, output: moments.add(output)
