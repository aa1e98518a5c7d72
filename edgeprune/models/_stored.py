"""Tensors of safetensors files, read one at a time, so that memory does not grow with the model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from edgeprune.errors import ModelError


@dataclass(frozen=True)
class TensorFiles:
    """`files` maps a tensor's name to the safetensors file that holds it."""

    files: dict[str, Path]

    def read(self, name: str) -> Tensor:
        """One tensor, as stored."""
        with _opened(self.files[name], name) as tensors:
            tensor: Tensor = tensors.get_tensor(name)
            return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without its bytes."""
        return self._headers[name][0]

    def dtype(self, name: str) -> str:
        """A tensor's dtype as safetensors names it, such as `BF16` or `F8_E4M3`."""
        return self._headers[name][1]

    def num_parameters(self) -> int:
        """How many numbers all tensors hold."""
        return sum(math.prod(self.shape(name)) for name in self.files)

    @cached_property
    def _headers(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of every tensor; each file is opened once."""
        found = {}
        for file in sorted(set(self.files.values())):
            with _opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118  # no mapping
                    part = tensors.get_slice(name)
                    found[name] = tuple(part.get_shape()), str(part.get_dtype())
        return found


@contextmanager
def _opened(file: Path, name: str = "") -> Iterator[Any]:
    """A safetensors file; ModelError where it, or a tensor of it, cannot be read."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError, KeyError) as error:
        where = f" at {name}" if name else ""
        raise ModelError(f"{file} is damaged{where} ({line(error)})") from error


def tensors_of(files: Sequence[Path]) -> dict[str, Path]:
    """The file of each tensor; ModelError where a file is no whole one, or two hold one tensor."""
    found: dict[str, Path] = {}
    for file in files:
        for name in _names(file):
            if name in found:
                raise ModelError(
                    f"{found[name]} and {file.name} both hold {name}; download the checkpoint again"
                )
            found[name] = file
    return found


def _names(file: Path) -> list[str]:
    if not file.is_file():
        raise ModelError(f"{file} is missing; download the checkpoint again")
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except RuntimeError as error:
        raise ModelError(
            f"{file} cannot be mapped into memory ({line(error)}); split it into smaller shards"
        ) from error
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{file} is not a whole safetensors file ({line(error)}); download it again"
        ) from error


def read_text(file: Path) -> str:
    """A text of the checkpoint; ModelError with the file's name where it is damaged."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read ({line(error)}); download it again") from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of the checkpoint; ModelError with the file's name where it is damaged."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read ({line(error)}); download it again") from error
    if not isinstance(data, dict):
        raise ModelError(f"{file} is not a JSON object; download it again")
    return data


def line(error: BaseException) -> str:
    """The first line of what an error says."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
