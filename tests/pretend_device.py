"""A device that is not there: tensors that say they are on it, and compute on the CPU.

It has the name `meta`, which torch takes for a device on any machine. An operator that is given one
of them refuses a tensor of the CPU beside it, as a real one does, but for numbers of no dimensions.
So what runs here leaves nothing behind on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from edgeprune.models._execution import Execution

DEVICE = torch.device("meta")
INDEXING = ("index", "index_put", "index_put_")
"""Operators whose indices, the second argument, a real device takes from the CPU too."""
COPIES = ("copy_", "_to_copy")
READS = (Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.item)
READS += (Tensor.tolist, Tensor.numpy)


class Far(Tensor):
    """A tensor of the pretended device."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> Far:
        far: Far = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, near.shape, strides=near.stride(), dtype=near.dtype, device=DEVICE
        )
        far.near = near
        return far

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return dispatch(func, args, kwargs or {})


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operator, with its result where its tensors are or where it is told to put it."""
    name = func.overloadpacket.__name__
    together = [arg for n, arg in enumerate(args) if not (name in INDEXING and n == 1)]
    far = any(isinstance(one, Far) for one in tree_leaves((args, kwargs)))
    if far and name not in COPIES:
        for one in tree_leaves((together, kwargs)):
            if isinstance(one, Tensor) and not isinstance(one, Far) and one.dim():
                raise RuntimeError(
                    f"{func}: a tensor {[*one.shape]} is on cpu, others on the device"
                )
    if kwargs.get("device") is not None:
        far = torch.device(kwargs["device"]).type == DEVICE.type
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = func(*tree_map(_near, args), **tree_map(_near, kwargs))
    if name == "copy_":
        return args[0]
    return tree_map(lambda x: Far(x) if isinstance(x, Tensor) else x, result) if far else result


def _near(value: Any) -> Any:
    return value.near if isinstance(value, Far) else value


class Operators(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return dispatch(func, args, kwargs or {})


class Functions(TorchFunctionMode):
    """What torch does before an operator is called, which asks a real device."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs, device="cpu").to(device)
        if func in READS and isinstance(args[0], Far):
            if func is Tensor.numpy:
                raise TypeError("can't convert a tensor of the device to numpy")
            args = (args[0].near, *args[1:])
        if func is Tensor.__setitem__ and isinstance(args[0], Far):  # torch forgets it on `meta`
            whole, at, values = args
            return whole.index_put_((torch.tensor(at, device="cpu"),), values)
        return func(*args, **kwargs)


@contextmanager
def pretended(monkeypatch: pytest.MonkeyPatch, free: int = 8 << 30) -> Iterator[Execution]:
    """While this is open, the device is there, with so many bytes free."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    with Functions(), Operators():
        yield Execution(DEVICE)
