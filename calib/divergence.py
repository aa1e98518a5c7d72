"""KL divergences of next-token distributions, from logits that come some tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor


class Divergences:
    """KL(p || q) of the distributions p of R rows and n others q of each.

    Only sums over the vocabulary are kept, in float64: all logits of a large vocabulary would be
    gigabytes.
    """

    def __init__(self, others: int, rows: int) -> None:
        self._peak = torch.full((rows,), -torch.inf, dtype=torch.float64)
        self._total = torch.zeros(rows, dtype=torch.float64)  # of exp(p - peak)
        self._apart = torch.zeros(others, rows, dtype=torch.float64)  # of exp(p - peak) * (p - q)
        self._others = torch.full((others, rows), -torch.inf, dtype=torch.float64)  # log-sum-exp

    def add(self, wanted: Tensor, found: Tensor) -> None:
        """Logits of some tokens of the vocabulary: [R, v] of p, [n, R, v] of q."""
        p, q = wanted.double(), found.double()
        peak = torch.maximum(self._peak, p.amax(-1))
        shrunk, weight = (self._peak - peak).exp(), (p - peak[:, None]).exp()
        self._total = self._total * shrunk + weight.sum(-1)
        self._apart = self._apart * shrunk + (weight * (p - q)).sum(-1)
        self._others = torch.logaddexp(self._others, q.logsumexp(-1))
        self._peak = peak

    def mean(self) -> Tensor:
        """The mean over the rows: float64 [n]."""
        of_p = self._peak + self._total.log()
        return (self._apart / self._total - of_p + self._others).mean(-1)
