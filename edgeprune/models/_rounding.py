"""Rounding a checkpoint's numbers to the dtype of an export: every one must be finite and fit."""

from __future__ import annotations

import torch
from torch import Tensor

from edgeprune.errors import ModelError
from edgeprune.lowering import DTYPES

TORCH: dict[str, torch.dtype] = {d.name: getattr(torch, d.torch) for d in DTYPES.values()}
"""torch's dtypes by our names."""
NAMES = {dtype: name for name, dtype in TORCH.items()}
WIDER = {torch.float16: "--dtype bf16 or --dtype fp32", torch.bfloat16: "--dtype fp32"}
"""What takes the numbers that a dtype cannot."""


def rounded(tensor: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """A tensor in another dtype; ModelError, which says `where` it is stored, unless all is finite.

    Numbers below the smallest of the dtype become 0: what that costs shows in the logits.
    """
    converted = tensor.to(dtype)
    if converted.numel() == 0 or all(bound.isfinite() for bound in torch.aminmax(converted)):
        return converted
    stored = tensor.double()
    if lost := int((~stored.isfinite()).sum()):
        raise ModelError(
            f"{where} holds {lost:,} of {stored.numel():,} numbers that are infinite or not a"
            " number; the checkpoint is damaged, download it again"
        )
    raise ModelError(
        f"{where} holds {float(stored.abs().max()):.4g}, {NAMES[dtype]} ends at"
        f" {torch.finfo(dtype).max:,.6g}; take {WIDER[dtype]} (of a calibration --reference-dtype)"
    )
