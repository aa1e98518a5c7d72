"""A module whose weights are in memory only while they are used."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from edgeprune.models._adapter import Adapter
from edgeprune.models._layers import Linear, compute_buffers


class Streamed:
    """A module without weights, whose parts have theirs while they are used."""

    def __init__(
        self,
        adapter: Adapter,
        module: nn.Module,
        dtype: torch.dtype,
        *,
        held: torch.dtype | None = None,
    ) -> None:
        """`held`: weights and tables have the values that a graph of this dtype holds; quantised
        weights have them anyway, since their scales are of that dtype."""
        self.module, self.dtype, self._adapter, self._held = module.eval(), dtype, adapter, held
        self._sources = adapter.sources(module)
        self._quantised: Collection[str] = adapter.weights.forms if adapter.weights else ()
        self.parts: dict[str, list[str]] = {}
        for name in self._sources:
            self.parts.setdefault(part_of(name), []).append(name)
        compute_buffers(module, dtype)
        if held is not None:
            for buffer in module.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(buffer.to(held))
        self.execution = adapter.execution
        with self.execution.room():
            for part in module.modules():
                for name, table in part.named_buffers(recurse=False):
                    setattr(part, name, self.execution.send(table))

    def bytes(self, parts: Collection[str]) -> int:
        """Bytes of the parameters of these parts."""
        names = (name for part in parts for name in self.parts.get(part, ()))
        return sum(self.module.get_parameter(n).numel() for n in names) * self.dtype.itemsize

    @contextmanager
    def loaded(self, *parts: str) -> Iterator[None]:
        """While this is open, the parameters of these parts are in the device's memory."""
        names = [name for part in parts for name in self.parts.get(part, ())]
        empty = {name: self.module.get_parameter(name) for name in names}
        try:
            with self.execution.room():
                for name in names:
                    self._set(name, *self._read(name))
            yield
        finally:
            for name, parameter in empty.items():
                self._set(name, parameter)

    def _read(self, name: str) -> tuple[Tensor, Tensor | None]:
        """A parameter, and the offsets that a graph has beside it."""
        source = self._sources[name]
        if name in self._quantised:
            return self._adapter.reader.terms(source, self.dtype)
        return self._adapter.reader.read(source, self._held or self.dtype).to(self.dtype), None

    def _set(self, name: str, value: Tensor, offsets: Tensor | None = None) -> None:
        owner, _, leaf = name.rpartition(".")
        part = self.module.get_submodule(owner)
        by_output = value.dtype == torch.float16 and self.execution.on_host
        if by_output and isinstance(part, Linear) and leaf == "weight":
            # torch multiplies fp16 matrices on a CPU ten times as fast output by output
            value = value.t().contiguous().t()
        setattr(part, leaf, nn.Parameter(self.execution.send(value), requires_grad=False))
        if isinstance(part, Linear) and leaf == "weight":
            part.offsets = None if offsets is None else self.execution.send(offsets)


def part_of(name: str) -> str:
    """What is loaded together with a parameter: its decoder layer, its encoder block, or what else
    has its first name."""
    numbered = re.match(r"(encoder\.blocks|layers)\.\d+", name)
    return numbered[0] if numbered else name.partition(".")[0]
