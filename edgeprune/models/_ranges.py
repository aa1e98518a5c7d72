"""How large a model's numbers become: the largest magnitude of each operator's result, by module.

The same modules run in float32 and in half precision call the same operators in the same order, so
an operator has one key in both runs. The float32 run gives the size of its result, the other one
whether it is held in half precision.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from edgeprune.models._dialogues import Outcome
from edgeprune.models._eager import Eager
from edgeprune.models._layers import Linear
from edgeprune.models._ops import Causal, TorchOps, scores
from edgeprune.models._processor import Prompt

MOVES = {
    *("_to_copy", "_unsafe_view", "cat", "clone", "constant_pad_nd", "copy_", "embedding", "empty"),
    *("full", "gather", "index", "index_copy", "index_select", "masked_fill", "repeat"),
    *("scalar_tensor", "scatter", "stack", "where", "zeros"),
}
"""Operators that give back what they read, and constants."""

INPUT = "input"
"""The operator's name in the key of what a Linear reads: it may have to be rounded for it."""

CAST = "cast"
"""Of a rounding from float32, which the float32 run does not have."""

RSQRT = "rsqrt"
"""Of a norm: 1 / its root mean square, computed in float32."""

HALF = torch.float16, torch.bfloat16

Key = tuple[str, str, int]  # module's path, operator, how often the module called it before


@dataclass
class Peak:
    """The largest magnitude of one operator's results; NaN is above all numbers."""

    dtype: torch.dtype
    value: float = 0.0
    sample: int = 0  # that has it, from 1

    def raise_to(self, value: float, sample: int) -> None:
        if not value <= self.value:
            self.value, self.sample = math.inf if math.isnan(value) else value, sample


Peaks = dict[Key, Peak]
"""By key, in the order in which operators run."""


class ScoredOps(TorchOps):
    """Computes attention scores apart as well: inside torch's attention they cannot be seen."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Causal | Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        scores(query, key, scale)
        return super().attend(query, key, value, mask, scale)


class Meter(TorchDispatchMode):
    """Notes every floating-point result of the modules that it watches."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peaks: Peaks = {}
        self.sample = 0
        self._path, self._calls = [""], Counter[tuple[str, str]]()

    @contextmanager
    def watching(self, name: str, module: nn.Module) -> Iterator[None]:
        """Results of `module`'s parts, while they run, have their names in their key."""
        handles = []
        for path, part in module.named_modules(prefix=name):
            enter, leave = partial(self._enter, path), self._leave
            handles.append(part.register_forward_pre_hook(enter))
            handles.append(part.register_forward_hook(leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def metering(self, stage: str, sample: int) -> Iterator[None]:
        """Note results within: a sample in a stage, which counts operators from 0; those of no
        module have the stage's path."""
        self._path, self.sample = [stage], sample
        self._calls.clear()
        with self:
            yield

    def _enter(self, path: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._path.append(path)
        if isinstance(module, Linear):
            with torch._C._DisableTorchDispatch():
                self._note(path, INPUT, inputs[0], module.dtype)

    def _leave(self, *_: object) -> None:
        self._path.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name, first = func.overloadpacket.__name__, result
        if name == "native_layer_norm":  # an engine keeps mean and 1 / deviation to itself
            self._note(self._path[-1], RSQRT, result[2], torch.float32)
        if isinstance(first, tuple):
            first = first[0]
        if isinstance(first, Tensor) and first.is_floating_point():
            if name == "_to_copy" and first.dtype in HALF:
                self._note(self._path[-1], CAST, first, first.dtype)
            elif not (func.is_view or name in MOVES):
                self._note(self._path[-1], name, first, first.dtype)
        return result

    def _note(self, path: str, operator: str, result: Tensor, dtype: torch.dtype) -> None:
        key = path, operator, self._calls[path, operator]
        self._calls[path, operator] += 1
        peak = self.peaks.setdefault(key, Peak(dtype))
        if result.numel():
            peak.raise_to(float(result.abs().amax()), self.sample)


def measure(
    model: Eager, prompts: Sequence[Prompt], report: Callable[[int, int], None]
) -> tuple[Peaks, list[Outcome]]:
    """The peaks of a model built with ScoredOps over a dialogue about each prompt, and what it made
    of them."""
    meter = Meter()
    vision = meter.watching("vision", model.vision.vision)
    with vision, meter.watching("decoder", model.decoder.decoder):
        outcomes = model.outcomes(prompts, report, meter.metering)
    return meter.peaks, outcomes
