"""The bound that forgets the ranking, and the price of a token and layer at which it is largest.

It costs milliseconds; sweeps compare what is spent by this price, and the search for a bound that
schedules are certified with (`_certificate`) starts from what tokens cost here.
"""

from __future__ import annotations

import numpy as np

from edgeprune.calib.solvers._pairs import Tokens
from edgeprune.calib.solvers._problem import Floats, Problem


def simple_bound(problem: Problem) -> tuple[float, float]:
    """The bound without ranking, max over the price of a token and layer; and that price.

    LB = max_p (1/S) sum_{s,j} min_d (price^d_{s,j} + p d) - p (total - r_1), concave in p.
    """
    return best_price(Tokens.of(problem), problem.total - problem.first)


def best_price(tokens: Tokens, budget: float) -> tuple[float, float]:
    """The same for tokens and what layers behind the first may spend."""
    leave = np.concatenate([tokens.price, np.zeros_like(tokens.price[:1])])  # to stay is free
    layers = np.arange(len(leave))[:, None, None]
    samples = leave.shape[1]

    def dual(price: float) -> float:
        return float((leave + price * layers).min(0).sum() / samples - price * budget)

    low, high, golden = 0.0, float(leave.max()), (5**0.5 - 1) / 2
    for _ in range(50):
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (left, high) if dual(left) < dual(right) else (low, right)
    return max(dual(low), dual(high), 0.0), (low + high) / 2


def cheapest_ways(tokens: Tokens, price: float) -> Floats:
    """What a token that is alive behind each decision costs at least from there on, were it to
    leave where it likes and to pay a price for each layer: [L-2, S, n]."""
    found, to_come = np.empty((len(tokens.price) - 1, *tokens.price.shape[1:])), 0.0
    for d in range(len(tokens.price) - 1, 0, -1):
        found[d - 1] = to_come = np.minimum(tokens.price[d], price + to_come)
    return found
