"""PruMerge+: as PruMerge, and tokens spread evenly over the rest of the picture beside them.

A quarter of the chosen tokens have the most [CLS] attention, as PruMerge's; the others lie at even
steps among the tokens that are left, in reading order, and follow them. All take in their
neighbours as in PruMerge; see `edgeprune methods prumerge`, its deviations too.
Deviation: the paper's share of tokens by attention follows their outliers, the released code steps
over the whole picture and drops what was chosen before, so that its count varies; here both counts
are fixed. A quarter is what the paper's mean counts are: 36 of 144 at CR 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from edgeprune.errors import SpecError
from edgeprune.policies import prumerge
from edgeprune.policies._merge import others
from edgeprune.policies._select import ranked, steps


@dataclass(frozen=True)
class Policy(prumerge.Policy):
    outliers: float = 0.25  # share of the chosen tokens that attention chooses

    summary: ClassVar[str] = "as prumerge, most tokens spread evenly over the picture"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.outliers <= 1:
            raise SpecError(f"--set outliers= is a share from 0 to 1; got {self.outliers:g}")

    def choose(self, attention: Tensor, count: int) -> Tensor:
        best = ranked(attention, max(1, round(self.outliers * count)))
        if best.shape[0] == count:
            return best
        rest = others(best, attention.shape[0])
        spread = torch.tensor(steps(rest.shape[0], count - best.shape[0]), device=rest.device)
        return torch.cat([best, rest.index_select(0, spread)])
