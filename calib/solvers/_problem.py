"""The schedule problem in rank space, and what a schedule costs (UTP paper, Eq. 3-5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.intp]
Floats = NDArray[np.float64]
Measured = NDArray[np.floating[Any]]
Progress = Callable[[str, float, float], None]  # step, best objective so far, proven bound so far

CHUNK = 2_000_000  # token indices held at once when many schedules are evaluated together: 16 MB


@dataclass(frozen=True)
class Solution:
    """Counts r_1 .. r_L, their mean loss in radians, and a proven lower bound on the least loss."""

    counts: Ints
    objective: float
    bound: float


@dataclass(frozen=True)
class Goal:
    """When a search for a bound may stop."""

    gap: float = 0.05  # between objective and bound, as a share of the objective
    seconds: float | None = None  # None: after a number of answers that follows from the size
    patient: bool = False  # Ctrl-C ends the search, not the program


UNHURRIED = Goal()


def silent(step: str, objective: float, bound: float) -> None:
    """Report progress to nobody."""


def rank_order(scores: Measured) -> Ints:
    """Positions by falling score along the last axis; ties go to the lower position."""
    return np.argsort(-scores, axis=-1, kind="stable")


def round_to_sum(shares: Floats, total: int) -> Ints:
    """Integers that sum to `total`, by largest remainder; shares that never rise stay so.

    Of two shares with one floor the larger has the larger remainder and the lower index wins a tie,
    so rounding cannot turn the order of two layers around.
    """
    counts = np.floor(shares + 1e-9).astype(np.intp)  # a mean such as 2.9999999 is 3
    remainders = shares - counts
    counts[rank_order(remainders)[: total - int(counts.sum())]] += 1
    return counts


@dataclass(frozen=True, eq=False)
class Problem:
    """Which counts lose least when they sum to `total` over the layers.

    Decision d = 0 .. L-2 picks the tokens that enter layer d + 2: it ranks them by a^{d+1} and
    charges ell_{d+2} a^{d+2} / sum a^{d+2} for each one dropped. Only the n = r_1 tokens that enter
    layer 1 take part. A token has an index, sample * (n + 1) + rank at decision d, so
    that one flat `take` serves all samples; rank n is a dummy that costs nothing and pads rows.

    Where r_1 is open, one more decision comes before these: it picks the tokens that enter layer 1
    of the n that the encoder gives. Counts then are n, r_1 .. r_L.
    """

    prices: Floats  # [L-1, S, n+1] radians lost by dropping the token of that index
    carry: Ints  # [L-1, S, n+1] index of the same token at the next decision
    total: int  # the budget: r_1 + ... + r_L
    least: int | None = None  # where r_1 is open: how many tokens enter layer 1 at least

    @classmethod
    def pose(
        cls,
        attention: Measured,
        loss: Measured,
        entry: Measured | None,
        first: int,
        total: int,
    ) -> Problem:
        """attention [S, L, V], loss [S, L] in radians, entry [S, V] (None: all V tokens enter)."""
        attention = np.asarray(attention, np.float64)
        mass = attention.sum(-1, keepdims=True)  # over all V tokens, dropped or not (Eq. 4)
        share = np.divide(attention, mass, out=np.zeros_like(attention), where=mass > 0)
        if entry is not None:
            entered = np.sort(rank_order(entry)[:, :first], axis=-1)[:, None]
            attention = np.take_along_axis(attention, entered, -1)
            share = np.take_along_axis(share, entered, -1)
        n_samples, n_layers, n_tokens = attention.shape
        order = rank_order(attention[:, :-1]).swapaxes(0, 1)
        rank = np.argsort(order, axis=-1)  # the inverse permutation
        base = np.arange(n_samples)[:, None] * (n_tokens + 1)

        prices = np.zeros((n_layers - 1, n_samples, n_tokens + 1))
        price = (loss[:, :, None] * share)[:, 1:].swapaxes(0, 1)
        prices[..., :-1] = np.take_along_axis(price, order, -1)
        carry = np.empty(prices.shape, np.intp)
        carry[..., -1:] = base + n_tokens  # the dummy stays the dummy
        carry[:-1, :, :-1] = np.take_along_axis(rank[1:], order[:-1], -1) + base
        carry[-1, :, :-1] = order[-1] + base  # nothing is left to decide: back to token order
        return cls(prices, carry, total)

    @classmethod
    def pose_open(
        cls, attention: Measured, loss: Measured, entry: Measured, lost: Floats, least: int
    ) -> Problem:
        """The same with r_1 open, `least` tokens or more by falling `entry` [S, V]. `lost` [V + 1]
        is the loss in radians where so many enter layer 1; it never rises. No budget of tokens."""
        samples, layers, tokens = attention.shape
        ranked = np.concatenate([entry[:, None], attention], axis=1)
        behind = np.concatenate([np.zeros((samples, 1)), loss], axis=1)
        posed = cls.pose(ranked, behind, None, tokens, tokens * layers)
        posed.prices[0, :, :-1] = -np.diff(lost)  # of the token of each rank, on every sample
        return replace(posed, least=least)

    def falling_at(self, decisions: Sequence[int]) -> Problem:
        """The same with these decisions alone, and that on r_1 where it is open: at the others all
        tokens go on."""
        kept = list(decisions)
        if self.least is not None:
            kept = [0, *(d + 1 for d in kept)]
        carry = list[Ints]()
        for start, end in pairwise([*kept, self.n_decisions]):
            carried = self.carry[start]
            for others in self.carry[start + 1 : end]:
                carried = others.take(carried)
            carry.append(carried)
        return replace(self, prices=self.prices[kept], carry=np.array(carry))

    def sample(self, index: int) -> Problem:
        """The same problem for one sample alone."""
        rows = slice(index, index + 1)
        carry = self.carry[:, rows] - index * (self.first + 1)
        return replace(self, prices=self.prices[:, rows], carry=carry)

    @property
    def n_decisions(self) -> int:
        return len(self.prices)

    @property
    def n_samples(self) -> int:
        return len(self.prices[0])

    @property
    def first(self) -> int:
        return int(self.prices.shape[2]) - 1

    @cached_property
    def start(self) -> Ints:
        """Places at decision 0 of the tokens that enter layer 1: [S, n], rising in a row."""
        indices = np.arange(self.n_samples * (self.first + 1))
        return indices.reshape(self.n_samples, -1)[:, :-1]

    @cached_property
    def dummies(self) -> Ints:
        """Each sample's index that stands for no token: [S, 1]."""
        return self.start[:, -1:] + 1

    def evaluate(self, counts: Ints) -> Floats:
        """Mean over samples of sum_l t_l in radians for each schedule: [C, L] -> [C]."""
        step = max(1, CHUNK // self.start.size)
        chunks = [counts[i : i + step] for i in range(0, len(counts), step)]
        return np.concatenate([self._evaluate(chunk) for chunk in chunks])

    def _evaluate(self, counts: Ints) -> Floats:
        cost = np.zeros(len(counts))
        alive = np.broadcast_to(self.start, (len(counts), *self.start.shape))
        for d in range(self.n_decisions):
            keep = counts[:, d + 1]
            if (keep < counts[:, d]).any():
                alive = np.sort(alive, axis=-1)
                low, high = int(keep.min()), int(keep.max())
                gone = np.arange(alive.shape[-1]) >= keep[:, None, None]
                cost += (self.prices[d].take(alive[..., low:]) * gone[..., low:]).sum((-2, -1))
                alive = np.where(gone[..., :high], self.dummies, alive[..., :high])
            alive = self.carry[d].take(alive)
        return cost / self.n_samples
