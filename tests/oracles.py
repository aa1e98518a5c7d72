"""What selectors and scores must give, written from the papers' formulas as loops in numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import assume


def cosines(tokens: np.ndarray, others: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(tokens, axis=1)[:, None], np.linalg.norm(others, axis=1)
    return tokens @ others.T / np.maximum(lengths[0] * lengths[1], 1e-12)


def determinant(vectors: np.ndarray, keep: int) -> list[int]:
    """Each time the token that makes the largest determinant; spanned ones by their length."""
    kernel, chosen = vectors @ vectors.T, list[int]()
    while len(chosen) < keep:
        rest, gains = [i for i in range(len(kernel)) if i not in chosen], {}
        for i in rest:
            picked = kernel[np.ix_(chosen, chosen)]
            spanned = kernel[i, chosen] @ np.linalg.pinv(picked, hermitian=True) @ kernel[chosen, i]
            left = kernel[i, i] - (spanned if chosen else 0)
            gains[i] = round(max(left, 1e-4 * kernel[i, i]), 9)
        chosen.append(max(rest, key=lambda i: (gains[i], -i)))
    return sorted(chosen)


def without_pairs(
    tokens: np.ndarray, order: Sequence[int], keep: int, batch: int, apart: float = 0.0
) -> list[int]:
    """Where `apart` is given, examples are passed over whose likenesses differ by less than that,
    be it only by rounding."""
    cosine, order = np.round(cosines(tokens, tokens), 9 if apart else 6), list(order)
    while len(order) > keep:
        even, odd = order[::2], order[1::2]
        excess = min(batch, len(order) - keep)
        likeness = {i: max(cosine[i, j] for j in odd) for i in even}
        if apart:
            assume(np.diff(sorted(likeness.values())).min(initial=1) >= apart)
        alike = sorted(even, key=lambda i: (-likeness[i], even.index(i)))
        order = alike[excess:] + odd
    return order


def unlike(
    tokens: np.ndarray, pivots: np.ndarray, quotas: Sequence[int], taken: Sequence[float]
) -> list[float]:
    cosine, taken = np.round(cosines(pivots, tokens), 6), list(taken)
    for row, quota in zip(cosine, quotas, strict=True):
        free = [i for i, mark in enumerate(taken) if not mark]
        for i in sorted(free, key=lambda i: (row[i], i))[:quota]:
            taken[i] = 1.0
    return taken


def max_min(tokens: np.ndarray, keep: int) -> list[int]:
    distance, chosen = 1 - cosines(tokens, tokens), list[int]()
    everyone = range(len(tokens))
    while len(chosen) < keep:
        rest = [i for i in everyone if i not in chosen]
        against = {i: chosen or [j for j in everyone if j != i] for i in rest}
        nearest = {i: min((distance[i, j] for j in against[i]), default=9) for i in rest}
        chosen.append(max(rest, key=lambda i: (nearest[i], -i)))
    return sorted(chosen)


def min_sum(tokens: np.ndarray, keep: int) -> list[int]:
    cosine, chosen = cosines(tokens, tokens), list[int]()
    while len(chosen) < keep:
        rest = [i for i in range(len(tokens)) if i not in chosen]
        against = chosen or range(len(tokens))
        chosen.append(min(rest, key=lambda i: (sum(cosine[i, j] for j in against), i)))
    return sorted(chosen)


def root_distances(tokens: np.ndarray) -> np.ndarray:
    """Eq. (1) of Polymorphic: |x_i - x_j| / sqrt(C), by subtraction."""
    differences = tokens[:, None] - tokens[None, :]
    return np.sqrt((differences**2).sum(-1) / tokens.shape[1])


def centres(apart: np.ndarray, count: int) -> list[int]:
    """Eq. (3) and (5): rho * delta, with the largest distance where no token is denser."""
    everyone = range(len(apart))
    density = [np.exp(-np.mean(np.round(np.sort(row)[:count] ** 2, 12))) for row in apart]
    scores = []
    for i in everyone:
        denser = [apart[i, j] for j in everyone if density[j] > density[i]]
        scores.append(density[i] * (min(denser) if denser else apart.max() + 1))
    return sorted(everyone, key=lambda i: (-round(scores[i], 9), i))[:count]


def members(apart: np.ndarray, centres: list[int]) -> list[list[int]]:
    """Eq. (6), a centre being its own cluster's."""
    clusters: list[list[int]] = [[] for _ in centres]
    for i in range(len(apart)):
        near = [round(apart[i, c], 9) for c in centres]
        clusters[centres.index(i) if i in centres else int(np.argmin(near))].append(i)
    return clusters


def merged(tokens: np.ndarray, count: int) -> tuple[list[int], np.ndarray]:
    apart = root_distances(tokens)
    chosen = centres(apart, count)
    means = [tokens[own].mean(0) for own in members(apart, chosen)]
    return chosen, np.array(means).reshape(count, tokens.shape[1])


def similarity(visual: np.ndarray, text: np.ndarray, scale: float) -> np.ndarray:
    """Polymorphic Eq. (9): for each visual token a softmax over the text tokens."""
    rows = []
    for token in visual:
        logits = np.array([token @ word * scale for word in text])
        weights = np.exp(logits - logits.max())
        rows.append(weights / weights.sum())
    return np.array(rows).reshape(len(visual), len(text))


def raters(shares: np.ndarray) -> np.ndarray:
    """Eq. (10): text tokens above the mean of s_j, all where none is; the weights of Eq. (11)."""
    means = shares.mean(0)
    chosen = means > means.mean() * (1 + 1e-6)
    chosen = chosen if chosen.any() else np.ones(len(means), bool)
    return chosen / chosen.sum()
