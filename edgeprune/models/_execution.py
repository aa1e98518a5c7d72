"""Where the eager model computes, and in which dtype it calibrates.

Weights are read, and activations kept, in the host's memory. A layer goes to the device while it is
used, and one sample after another goes there, through it and back. So a device holds a layer or a
window of layers and one sample's work, whatever the model's size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from edgeprune.errors import ModelError, SpecError
from edgeprune.lowering import DTYPES
from edgeprune.models._activations import changed
from edgeprune.models._rounding import NAMES, TORCH

CPU = torch.device("cpu")
S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Execution:
    """A device, and the dtype of the model that is calibrated on it."""

    device: torch.device = CPU
    dtype: torch.dtype = torch.float32

    @classmethod
    def parse(cls, device: str, dtype: str) -> Execution:
        """From --device and --reference-dtype; SpecError where they are not known."""
        if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", device):
            raise SpecError(f"--device is cpu, cuda or cuda:N; got {device!r}")
        if dtype not in DTYPES:
            raise SpecError(f"--reference-dtype is one of {', '.join(DTYPES)}; got {dtype!r}")
        named = "cuda:0" if device == "cuda" else device
        return cls(torch.device(named), TORCH[dtype])

    def __str__(self) -> str:
        return f"{self.device.type} {NAMES[self.dtype]}"

    @property
    def on_host(self) -> bool:
        """Whether the device is the CPU, so that nothing has to be sent."""
        return self.device.type == "cpu"

    def require(self) -> None:
        """SpecError where the device is not there."""
        if self.on_host:
            return
        if not torch.cuda.is_available():
            why = "torch finds no NVIDIA GPU or no driver for it"
            if torch.version.cuda is None:
                why = f"torch {torch.__version__} is built without CUDA; install one that has it"
            raise SpecError(f"--device {self.device} is not there: {why}, or use --device cpu")
        count = torch.cuda.device_count()
        if (self.device.index or 0) >= count:
            there = ", ".join(f"cuda:{number}" for number in range(count))
            raise SpecError(f"--device {self.device} is not there; this machine has {there}")

    def free_bytes(self) -> int | None:
        """Free memory of the device; None of the CPU, whose memory is the host's."""
        return None if self.on_host else torch.cuda.mem_get_info(self.device)[0]

    def run(self, step: Callable[[S], T], value: S) -> T:
        """What a step makes of a value, computed on the device; both are in the host's memory."""
        if self.on_host:
            return step(value)
        with self.room(), _exact(), self.device:
            return self.fetch(step(self.send(value)))

    def send(self, value: T) -> T:
        """A value with all its tensors on the device."""
        return value if self.on_host else _moved(value, self.device)

    def fetch(self, value: T) -> T:
        """A value with all its tensors in the host's memory."""
        return value if self.on_host else _moved(value, CPU)

    @contextmanager
    def room(self) -> Iterator[None]:
        """ModelError where the device runs out of memory within."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"{self.device} has no memory left for one layer and one sample; free some there,"
                " or use --device cpu"
            ) from error


HOST = Execution()


def _moved(value: T, device: torch.device) -> T:
    moved: T = changed(value, partial(_to, device))
    return moved


def _to(device: torch.device, tensor: Any) -> Any:
    return tensor.to(device) if isinstance(tensor, Tensor) else tensor


@contextmanager
def _exact() -> Iterator[None]:
    """Products and convolutions of float32 without TF32, sums of half precision in float32, so that
    a GPU agrees with the CPU up to rounding."""
    products = torch.backends.cuda.matmul
    names = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    before = torch.get_float32_matmul_precision(), *(getattr(products, name) for name in names)
    torch.set_float32_matmul_precision("highest")
    for name in names:
        setattr(products, name, False)
    try:
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        for name, value in zip(names, before[1:], strict=True):
            setattr(products, name, value)
