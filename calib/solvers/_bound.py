"""The bound that forgets the ranking, and the price of a token and layer at which it is largest.

It costs milliseconds; sweeps compare what is spent by this price. What schedules are certified with
is `_certificate`.
"""

from __future__ import annotations

import numpy as np

from edgeprune.calib.solvers._pairs import Tokens
from edgeprune.calib.solvers._problem import Problem


def simple_bound(problem: Problem) -> tuple[float, float]:
    """The bound without ranking, max over the price of a token and layer; and that price.

    LB = max_p (1/S) sum_{s,j} min_d (price^d_{s,j} + p d) - p (total - r_1), concave in p.
    """
    leave = Tokens.of(problem).price
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
