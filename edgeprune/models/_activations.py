"""Activations of many samples between two layers: in memory up to a bound, the rest in a file."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import IO, Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from edgeprune.errors import ModelError
from edgeprune.models._permutation import inverse

T = TypeVar("T")
BOUND = 1 << 30
"""Bytes of activations that stay in memory."""


@dataclass(frozen=True)
class OnDisk:
    """Stands for the next tensor of the file. Its axes get the order in memory that they had,
    because products round differently for other layouts."""

    shape: tuple[int, ...]  # in the file
    dtype: torch.dtype
    order: tuple[int, ...]  # axis of the tensor at each of the file's


class Writable(Protocol):
    """What takes bytes."""

    def write(self, data: Any, /) -> Any: ...


def write_tensor(file: Writable, tensor: Any) -> OnDisk:
    """Append a tensor to a file."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    laid_out = tensor.permute(order).contiguous()
    file.write(_bytes(laid_out))
    return OnDisk(tuple(laid_out.shape), tensor.dtype, tuple(order))


def read_tensor(file: IO[bytes], tensor: Any) -> Any:
    """The tensor at a file's position; what is none in the file is given back. EOFError where the
    file ends before it."""
    if not isinstance(tensor, OnDisk):
        return tensor
    found = torch.empty(tensor.shape, dtype=tensor.dtype)
    if file.readinto(_bytes(found)) != found.nbytes:  # type: ignore[attr-defined]
        raise EOFError("a file of tensors is shorter than it was")
    return found.permute(inverse(tensor.order))


class Activations:
    """Keeps values of samples; all that one object keeps shares one bound of memory."""

    def __init__(self, bound: int = BOUND) -> None:
        self.bound, self.held = bound, 0

    def keep(self, values: Iterable[T]) -> Kept[T]:
        """Take values, one after another; ModelError where the disk is full.

        Their tensors are found in dataclasses and tuples.
        """
        kept = Kept[T](self)
        try:
            for value in values:
                kept.append(value)
            kept.flush()
        except BaseException:
            kept.close()
            raise
        return kept


class Kept(Generic[T]):
    """Values that are taken once, in the order in which they came."""

    def __init__(self, room: Activations) -> None:
        self._room = room
        self._values: deque[Any] = deque()
        self._file: IO[bytes] | None = None

    def __len__(self) -> int:
        return len(self._values)

    def append(self, value: T) -> None:
        """Keep one more, in the file where memory has no room for all of it."""
        size = _size(value)
        if self._room.held + size <= self._room.bound:
            self._room.held += size
            self._values.append(value)
        else:
            with _disk():
                self._values.append(changed(value, self._write))

    def flush(self) -> None:
        """Have all that was kept on the disk."""
        if self._file is not None:
            with _disk():
                self._file.flush()

    def __iter__(self) -> Iterator[T]:
        """Every value, which stays here."""
        if self._file is not None:
            self._file.seek(0)
        for value in self._values:
            yield changed(value, self._read)

    def drain(self) -> Iterator[T]:
        """Every value, which is forgotten here; at the end the file is gone."""
        try:
            if self._file is not None:
                self._file.seek(0)
            while self._values:
                value = self._values.popleft()
                self._room.held -= _size(value)  # 0 of what is in the file
                yield changed(value, self._read)
        finally:
            self.close()

    def close(self) -> None:
        """Forget what is left."""
        self._room.held -= sum(map(_size, self._values))
        self._values.clear()
        if self._file is not None:
            with suppress(OSError):  # of bytes that found no room
                self._file.close()

    def _write(self, tensor: Any) -> Any:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="edgeprune-")  # noqa: SIM115  # until drained
        return write_tensor(self._file, tensor)

    def _read(self, tensor: Any) -> Any:
        return tensor if self._file is None else read_tensor(self._file, tensor)


@contextmanager
def _disk() -> Iterator[None]:
    """ModelError where what is written here finds no room."""
    try:
        yield
    except OSError as error:
        raise ModelError(
            f"activations do not fit in {tempfile.gettempdir()} ({error.strerror}); set TMPDIR to a"
            " folder on a larger disk, or take fewer samples"
        ) from error


def _bytes(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor, to be written or read into."""
    return tensor.view(-1).view(torch.uint8).numpy()


def _size(value: Any) -> int:
    """Bytes of a value's tensors that are in memory."""
    found: list[int] = []

    def count(tensor: Any) -> Any:
        found.append(tensor.nbytes if isinstance(tensor, Tensor) else 0)
        return tensor

    changed(value, count)
    return sum(found)


def changed(value: Any, change: Callable[[Any], Any]) -> Any:
    """A value with each of its tensors changed, whichever dataclasses and tuples they are in."""
    if isinstance(value, Tensor | OnDisk):
        return change(value)
    if isinstance(value, tuple):
        return tuple(changed(item, change) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: changed(getattr(value, f.name), change) for f in fields(value)}
        return replace(value, **parts)
    return value
