"""How large the inputs of products are, channel by channel, over calibration samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from edgeprune.models import Adapter
from edgeprune.models._layers import Linear
from edgeprune.models._processor import Prompt
from edgeprune.models._reference import Reference
from edgeprune.models._weight_plan import HEAD
from edgeprune.policies import Policy
from edgeprune.progress import Progress
from edgeprune.spec import Plan

ANSWER = 8
"""Tokens that are answered to each sample, so that decoding is seen too."""


@dataclass
class Moments:
    """Sums over the rows x [K] that went into a product."""

    absolute: Tensor | float = 0.0  # of |x|
    squared: Tensor | float = 0.0  # of x^2
    rows: int = 0

    def add(self, x: Tensor) -> None:
        """Count the rows of a tensor [..., K]."""
        rows = x.reshape(-1, x.shape[-1]).float()
        self.absolute = self.absolute + rows.abs().sum(0)
        self.squared = self.squared + rows.square().sum(0)
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


def collect(
    adapter: Adapter, policy: Policy, plan: Plan, prompts: Sequence[Prompt], report: Progress
) -> dict[str, Moments]:
    """Moments of each product's inputs, by its weight's name, in the float32 model with a policy.

    Each prompt is answered by some tokens. The adapter's weights are the checkpoint's own. Products
    that nothing went into are left out.
    """
    model = Reference.build(adapter, policy, plan)
    found: dict[str, Moments] = {}
    with _listening(model, found):
        for number, prompt in enumerate(prompts, 1):
            model.generate(prompt, ANSWER, lambda token: False)
            report("activations", number, len(prompts))
    return {name: moments for name, moments in found.items() if moments.rows}


@contextmanager
def _listening(model: Reference, found: dict[str, Moments]) -> Iterator[None]:
    """While this is open, what goes into products is counted."""
    handles = [model.decoder.norm.register_forward_hook(_output(found.setdefault(HEAD, Moments())))]
    for module in (model.vision, model.decoder):
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
