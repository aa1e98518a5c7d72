"""A calibration that was killed goes on at the last finished layer.

After each layer, all samples' hidden states and what was measured so far are written to a work
folder: a file of tensors, then `state.json`, which names it. The JSON is written whole or not at
all, so at every moment there is one finished layer on the disk. Nothing in it is code: classes are
those of KINDS.
"""

from __future__ import annotations

import json
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

import torch
from torch import Tensor

from edgeprune.errors import EdgepruneError
from edgeprune.files import real, write_whole
from edgeprune.models._activations import OnDisk, changed, read_tensor, write_tensor
from edgeprune.models._decoder import Flow
from edgeprune.models._decoder_layer import Rotary
from edgeprune.policies._signals import Anchors, InputSignals, Segments

T = TypeVar("T")
FORMAT = 1
STATE = "state.json"
BLOCK = 1 << 20
Tell = Callable[[str], None]


def quiet(line: str) -> None:
    """Tell nobody."""


def beside(output: Path) -> Path | None:
    """The work folder of a calibration for an output; None where that is a device or a pipe."""
    if output.exists() and not (output.is_file() or output.is_dir()):
        return None
    target = real(output)
    return target.with_name(f"{target.name}.work")


@dataclass(frozen=True)
class Collected:
    """What was measured of the layers so far."""

    ids: tuple[str, ...]  # of the samples
    entry: tuple[Tensor, ...]  # float32 [V] of each sample, where there is one
    attention: tuple[Tensor, ...]  # float32 [S, V] of each layer


@dataclass(frozen=True)
class Finished(Generic[T]):
    """Where a calibration stood."""

    layers: int  # that all samples went through
    collected: Collected
    runs: Iterator[T]  # of each sample


class WorkFolder:
    """What a calibration of some key has finished."""

    def __init__(self, folder: Path, key: str, kind: type, tell: Tell = quiet) -> None:
        """`kind`: the dataclass of a sample between two layers."""
        self.folder, self.key, self.tell = folder, key, tell
        kinds = (kind, Collected, OnDisk, Flow, Rotary, Anchors, InputSignals, Segments)
        self._kinds = {one.__name__: one for one in kinds}
        self._is_open = True

    def make_room(self, need: int) -> None:
        """Say how much disk is needed; where there is less, nothing will be written."""
        there = next(one for one in self.folder.absolute().parents if one.exists())
        free, told = shutil.disk_usage(there).free, f"{self.folder} needs {need / 1e9:.1f} GB"
        if free < need:
            self._close(f"{told} of disk, {free / 1e9:.1f} GB is free")
        elif need >= 1e9:
            self.tell(f"{told} of disk until the calibration ends")

    def last(self) -> Finished[Any] | None:
        """Where the last calibration of the same key stood; None where there is nothing to go on
        from, which is told where it is for a reason."""
        if not (self.folder / STATE).is_file():
            return None
        try:
            state = json.loads((self.folder / STATE).read_bytes())
            if (state["format"], state["key"]) != (FORMAT, self.key):
                self.tell(f"{self.folder} is of another calibration: this one begins anew")
                return None
            data = self.folder / Path(state["data"]).name
            if _checksum(data) != state["checksum"]:
                raise ValueError("its checksum is another")
            values = self._values(data, state["values"])
            collected = next(values)
            layers = int(state["layers"])
        except (OSError, EOFError, ValueError, LookupError, TypeError, StopIteration) as error:
            self.tell(f"{self.folder} is damaged ({error}): the calibration begins anew")
            return None
        self.tell(f"{self.folder}: the calibration goes on behind {layers} finished layers")
        return Finished(layers, collected, values)

    def save(self, layers: int, collected: Collected, runs: Iterable[Any]) -> None:
        """All samples have gone through so many layers. A disk that is full is told once."""
        if not self._is_open:
            return
        data = self.folder / f"layers-{layers}-{secrets.token_hex(4)}.bin"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with data.open("wb") as file:
                checked = _Checked(file)
                write = partial(write_tensor, checked)
                values = [_encoded(changed(value, write)) for value in (collected, *runs)]
            state = {"format": FORMAT, "key": self.key, "layers": layers, "data": data.name}
            state |= {"checksum": checked.checksum, "values": values}
            write_whole(self.folder / STATE, json.dumps(state).encode())
        except (OSError, EdgepruneError) as error:
            with suppress(OSError):
                data.unlink(missing_ok=True)
            self._close(f"{self.folder} cannot be written ({error})")
            return
        self._sweep(data)

    def remove(self) -> None:
        """The calibration has ended."""
        with suppress(OSError):
            (self.folder / STATE).unlink(missing_ok=True)
            self._sweep(None)
            self.folder.rmdir()

    def _close(self, why: str) -> None:
        self._is_open = False
        self.tell(f"{why}: a calibration that is killed from here on begins anew")

    def _sweep(self, kept: Path | None) -> None:
        """Remove the tensors of other layers."""
        for file in self.folder.glob("layers-*.bin"):
            if file != kept:
                with suppress(OSError):
                    file.unlink()

    def _values(self, data: Path, values: list[Any]) -> Iterator[Any]:
        with data.open("rb") as file:
            for value in values:
                yield changed(self._decoded(value), partial(read_tensor, file))

    def _decoded(self, value: Any) -> Any:
        if isinstance(value, list):
            return tuple(map(self._decoded, value))
        if not isinstance(value, dict):
            return value
        if "dtype" in value and len(value) == 1:
            return getattr(torch, value["dtype"])
        kind = self._kinds[value["kind"]]
        return kind(**{name: self._decoded(part) for name, part in value["parts"].items()})


def _encoded(value: Any) -> Any:
    """As JSON: a tuple is a list, a dataclass an object with the name of its class."""
    if isinstance(value, tuple):
        return [_encoded(item) for item in value]
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: _encoded(getattr(value, field.name)) for field in fields(value)}
        return {"kind": type(value).__name__, "parts": parts}
    return value


class _Checked:
    """A file that is written, with the checksum of what was."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.checksum = file, 0

    def write(self, data: Any) -> None:
        self.checksum = zlib.crc32(data, self.checksum)
        self.file.write(data)


def _checksum(file: Path) -> int:
    checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum
