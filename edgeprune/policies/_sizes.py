"""Sizes of a call that a traced graph may not take for constants.

A prefill has every visual token of the image, a decode step none. The tracer decides by the sizes
of its example, takes every size for 2 or more, and freezes one that is exactly 1 there.
"""

from __future__ import annotations

import torch
from torch import Tensor


def least(count: int, live: int) -> int:
    """min(count, live), which stays symbolic while tracing, for 1 too.

    Take a size from here, never as the difference of two such sizes: where the difference is 1 in
    the example, the graph would broadcast in place of multiplying.
    """
    if count == 0:
        return 0
    if count > 1 or not torch.compiler.is_exporting():
        smaller: int = torch.sym_min(count, live)  # type: ignore[no-untyped-call]
        return smaller
    # The tracer would fold min(1, live) into 1; through a tensor's value it cannot.
    sizes = torch.scalar_tensor(live, dtype=torch.int64), torch.tensor(count)
    value: int = torch.minimum(*sizes).item()  # type: ignore[assignment]
    torch._check(value >= 0)  # type: ignore[no-untyped-call]
    torch._check(value <= live)  # type: ignore[no-untyped-call]
    return value


def given(count: Tensor, live: int) -> int:
    """min(count, live) of a count that is an input of the graph: int64 [1]."""
    alive = torch.scalar_tensor(live, dtype=torch.int64)[None]
    value: int = torch.minimum(count, alive).item()  # type: ignore[assignment]
    torch._check(value >= 0)  # type: ignore[no-untyped-call]
    torch._check(value <= live)  # type: ignore[no-untyped-call]
    return value


def total(x: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    """x.sum(dim) where that dimension may have no element, as in a decode step.

    ONNX Runtime's kernels for CUDA refuse to reduce it; one row of zeros more, and there is one.
    """
    shape = list(x.shape)
    shape[dim] = 1
    return torch.cat([x, x.new_zeros(shape)], dim).sum(dim, keepdim)
