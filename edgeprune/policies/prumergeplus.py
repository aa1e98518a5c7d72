"""PruMerge+: as PruMerge, and tokens spread evenly over the image beside them.

A quarter of the chosen tokens have the most [CLS] attention, as PruMerge's: k of N. The others lie
on a grid over the whole image, in reading order: tokens 0, s, 2s, ... below N - 1, s = floor(
floor(N / k) / 3), less those that were chosen before. All take in their neighbours as in PruMerge;
see `edgeprune methods prumerge`, its deviations too.

Deviation:
- In the released code k follows outliers of the attention and the count what the grid adds, so that
  both differ from image to image. Here both are fixed. A quarter is what the paper's mean counts
  are, 36 of 144 at CR 4, where that grid adds about 107. Where it adds more than there is room for,
  those with the least attention are left out; where fewer, those with the most attention fill up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from edgeprune.errors import SpecError
from edgeprune.policies import prumerge
from edgeprune.policies._select import TAKEN, ranked, top


@dataclass(frozen=True)
class Policy(prumerge.Policy):
    outliers: float = 0.25  # share of the chosen tokens that attention chooses

    summary: ClassVar[str] = "as prumerge, most tokens spread evenly over the image"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.outliers <= 1:
            raise SpecError(f"--set outliers= is a share from 0 to 1; got {self.outliers:g}")

    def choose(self, attention: Tensor, count: int) -> Tensor:
        total, first = attention.shape[0], max(1, round(self.outliers * count))
        best = ranked(attention, first)
        if first == count:
            return best
        indices = torch.arange(total, device=attention.device)
        taken = (best[:, None] == indices[None, :]).float().sum(0)
        on_grid = (indices % stride(total, first) == 0) & (indices < total - 1)
        spread = top(attention + on_grid.float() - TAKEN * taken, count - first)
        return torch.cat([best, spread])


def stride(tokens: int, chosen: int) -> int:
    """Steps of the grid beside `chosen` tokens, at least 1: int(int(1 / ratio) / 3)."""
    return max(1, tokens // chosen // 3)
