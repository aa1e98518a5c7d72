"""A part of a model as a graph of its own, which runs on noise for its time alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.graphs import STATES
from edgeprune.runtime.backend import Ids

_FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class TimedPart:
    """One session; its inputs are bound before it is timed, as in the middle of a larger graph."""

    def __init__(
        self,
        session: Any,
        host: Callable[[NDArray[Any]], Any],
        device: str,
        refusals: Callable[[], AbstractContextManager[None]],  # what ONNX Runtime raises, by name
    ) -> None:
        self._session, self._host, self._device = session, host, device
        self._refusals = refusals

    def ready(
        self,
        sizes: Mapping[str, int],
        ids: Mapping[str, Ids],
        *,
        again: bool = False,
        in_place: bool = False,
    ) -> Callable[[], None]:
        """What runs the graph once on noise, for these open sizes and whole numbers.

        With `again` it has just been run, as where parts like it follow each other. With `in_place`
        keys and values that are given out take the memory of those that came in, as states always
        do.
        """
        with self._refusals():
            binding, held = self._bound(sizes, ids, in_place)

        def run(_held: dict[str, Any] = held) -> None:
            with self._refusals():
                self._session.run_with_iobinding(binding)
                binding.synchronize_outputs()

        if again:
            run()
        return run

    def _bound(
        self, sizes: Mapping[str, int], ids: Mapping[str, Ids], in_place: bool
    ) -> tuple[Any, dict[str, Any]]:
        """A binding, and the inputs, which have to live as long."""
        binding, held = self._session.io_binding(), dict[str, Any]()
        for end in self._session.get_inputs():
            held[end.name] = self._host(_value(end, sizes, ids))
            binding.bind_ortvalue_input(end.name, held[end.name])
        for end in self._session.get_outputs():
            past = end.name.replace("present_", "past_")
            if past != end.name and past in held and (in_place or past in STATES):
                binding.bind_ortvalue_output(end.name, held[past])
            else:
                binding.bind_output(end.name, self._device)
        return binding, held


def _value(end: Any, sizes: Mapping[str, int], ids: Mapping[str, Ids]) -> NDArray[Any]:
    """Of one input."""
    if end.name in ids:
        return ids[end.name]
    shape = [sizes[dim] if isinstance(dim, str) else dim for dim in end.shape]
    noise = np.random.default_rng(0).standard_normal(prod(shape), np.float32)
    return noise.reshape(shape).astype(_FLOATS[end.type])
