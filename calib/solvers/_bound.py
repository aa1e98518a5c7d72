"""A proven lower bound on the least loss, from two relaxations that cost seconds.

Eq. (5) says that a token survives decision d exactly when it was alive and stands above the
cut-off of its sample: x^d = x^{d-1} AND y^d. Both halves of that are dualised with one free
multiplier q per token and decision: q > 0 prices x^d <= y^d, q < 0 prices x^d >= x^{d-1} + y^d - 1.
The budget gets a price per token and layer, the counts that samples share get offsets to it that
average to 0. What is left falls apart: each token picks when to leave, each cut-off picks a rank.

Any multipliers give a valid bound. q = 0 is the bound that forgets the ranking; Adam climbs from
there towards the bound of the linear relaxation of `exact`, without building that program.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.calib.solvers._problem import Floats, Ints, Problem

STEPS = 300, 1000  # large and small problems; 300 reach about 92% of the linear relaxation
WORK = 5e8  # token-decisions answered, between those limits: seconds
RATE = 0.5  # first step, in mean token prices
FADE, FADE_SQUARE = 0.9, 0.99  # Adam's averages
Real = NDArray[np.floating[Any]]


def simple_bound(problem: Problem) -> tuple[float, float]:
    """The bound without ranking, max over the price of a token and layer; and that price.

    LB = max_p (1/S) sum_{s,j} min_d (price^d_{s,j} + p d) - p (total - r_1), concave in p.
    """
    leave, _ = _by_token(problem)
    leave = np.concatenate([leave, np.zeros_like(leave[:1])])  # never to leave is free
    layers = np.arange(len(leave))[:, None, None]
    budget = problem.total - problem.first

    def dual(price: float) -> float:
        return float((leave + price * layers).min(0).sum() / problem.n_samples - price * budget)

    low, high, golden = 0.0, float(leave.max()), (5**0.5 - 1) / 2
    for _ in range(50):
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (left, high) if dual(left) < dual(right) else (low, right)
    return max(dual(low), dual(high), 0.0), (low + high) / 2


def tight_bound(problem: Problem, price: float) -> float:
    """The bound that knows the ranking, climbed to from a first price per token and layer."""
    dual = _Dual.start(problem, price)
    steps = int(np.clip(WORK / dual.leave.size, *STEPS))
    rate = RATE * float(dual.leave.mean())
    for step in range(1, steps + 1):
        dual.climb(step, rate * (0.5 + 0.5 * np.cos(np.pi * step / steps)))
    return dual.value(problem)


def _by_token(problem: Problem) -> tuple[Floats, Ints]:
    """Prices and ranks with tokens in one fixed order: [L-1, S, n] each."""
    base = problem.start[:, :1]
    indices, prices, ranks = problem.start, [], []
    for price, carry in zip(problem.prices, problem.carry, strict=True):
        prices.append(price.take(indices))
        ranks.append(indices - base)
        indices = carry.take(indices)
    return np.array(prices), np.array(ranks)


@dataclass
class _Adam:
    """Ascent with steps of about `rate` in each coordinate, whatever the gradient's scale."""

    at: Real
    mean: Real
    square: Real

    @classmethod
    def start(cls, at: Real) -> _Adam:
        return cls(at, np.zeros_like(at), np.zeros_like(at))

    def climb(self, part: int | slice, gradient: Real, rate: float, step: int) -> None:
        mean, square = self.mean[part], self.square[part]  # views
        mean += (1 - FADE) * (gradient - mean)
        square += (1 - FADE_SQUARE) * (gradient * gradient - square)
        root = np.sqrt(square / (1 - FADE_SQUARE**step)) + 1e-3
        self.at[part] += rate / (1 - FADE**step) * mean / root


@dataclass
class _Dual:
    """Multipliers, and the cheapest answer to them; float32, because a step is a sweep of memory.

    Work goes decision by decision, so that one slab [S, n] and its averages stay in the cache.
    """

    leave: Real  # [L-1, S, n] price of leaving at d
    rank: Ints  # [L-1, S, n] of a token at d
    ranked: Ints  # [L-1, S, n] tokens by rank, flat in [S, n]
    budget: int  # r_2 + ... + r_L
    link: _Adam  # [L-1, S, n] the multiplier q of x^d = x^{d-1} AND y^d
    share: _Adam  # [L-1, S] what a kept token costs in this sample beyond the common price
    price: _Adam  # [1] per token and layer

    @classmethod
    def start(cls, problem: Problem, price: float) -> _Dual:
        leave, rank = _by_token(problem)
        n_samples, n_tokens = problem.start.shape
        ranked = np.argsort(rank, axis=-1) + np.arange(n_samples)[:, None] * n_tokens
        return cls(
            leave.astype(np.float32),
            rank,
            ranked,
            problem.total - problem.first,
            _Adam.start(np.zeros(leave.shape, np.float32)),
            _Adam.start(np.zeros(leave.shape[:2], np.float32)),
            _Adam.start(np.array([price], np.float32)),
        )

    def value(self, problem: Problem) -> float:
        """The bound at these multipliers, in float64: rounding there would not be a proof."""
        exact = replace(
            self,
            leave=_by_token(problem)[0],
            link=_Adam.start(self.link.at.astype(np.float64)),
            share=_Adam.start(_centred(self.share.at.astype(np.float64))),
            price=_Adam.start(self.price.at.astype(np.float64)),
        )
        return exact.answer()[0]

    def answer(self) -> tuple[float, Ints, Ints]:
        """Bound, decision at which each token leaves [S, n] (L-1: never), ranks kept [L-1, S]."""
        n_decisions, n_samples, _ = self.leave.shape
        keep_price = self.share.at + self.price.at
        stay = np.zeros_like(self.leave[0])
        best, leaves = np.full_like(stay, np.inf), np.zeros(stay.shape, np.intp)
        cut = np.zeros((n_decisions, n_samples), np.intp)
        gain = 0.0
        for d, q in enumerate(self.link.at):
            floor = np.maximum(-q, 0)  # paid by tokens alive before d, refunded to all
            stay = stay + floor
            option = stay + self.leave[d]
            leaves[option < best] = d
            best = np.minimum(best, option)
            stay += q + keep_price[d][:, None]
            prefix = q.take(self.ranked[d]).cumsum(-1)
            top = np.maximum(prefix.max(-1), 0)
            cut[d] = np.where(top > 0, prefix.argmax(-1) + 1, 0)
            gain -= float(top.sum(dtype=np.float64) + floor.sum(dtype=np.float64))
        leaves[stay < best] = n_decisions
        gain += float(np.minimum(best, stay).sum(dtype=np.float64))
        return gain / n_samples - float(self.price.at[0]) * self.budget, leaves, cut

    def climb(self, step: int, rate: float) -> None:
        """One step along the gradient: what the answer violates, constraint by constraint."""
        _, leaves, cut = self.answer()
        kept = np.zeros(cut.shape, np.float32)  # tokens
        for d, q in enumerate(self.link.at):
            alive = leaves > d
            slope = alive.astype(np.float32) - (self.rank[d] < cut[d][:, None])
            slope += (q < 0) & (leaves < d)  # the dead owe nothing to x >= x' + y - 1
            self.link.climb(d, slope, rate, step)
            kept[d] = alive.sum(-1)
        self.share.climb(slice(None), _centred(kept), rate, step)
        self.share.at = _centred(self.share.at)
        excess = kept.sum(0).mean(keepdims=True) - self.budget
        self.price.climb(slice(None), excess, 0.3 * rate, step)
        np.maximum(self.price.at, 0, out=self.price.at)


def _centred(values: Real) -> Real:
    """[L-1, S] with mean 0 over samples: then r_l drops out of the bound but for the budget."""
    centred: Real = values - values.mean(1, keepdims=True)
    return centred
