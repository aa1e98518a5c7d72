"""Raters: the text tokens that visual tokens are most alike to, which then judge them."""

from __future__ import annotations

from torch import Tensor

from edgeprune.policies._sizes import total

MARGIN = 1e-6
"""By how much, relatively, a share must pass the mean: rounding alone makes no rater."""


def similarity(visual: Tensor, text: Tensor, scale: float = 1.0) -> Tensor:
    """Softmax over the text tokens of their dot products with each visual token, times `scale`.

    [n, width], [T, width] -> float32 [n, T].
    """
    return (visual.float() @ text.float().T * scale).softmax(-1)


def raters(shares: Tensor) -> Tensor:
    """Weights of the text tokens, 1 / |R| for raters and else 0: similarity [n, T] -> float32 [T].

    R holds the text tokens with more than the mean similarity to all visual tokens, which is 1 / T;
    where none has more, all are raters.
    """
    given = total(shares, 0)
    chosen = (given > given.mean() * (1 + MARGIN)).float()
    chosen = chosen + (chosen.sum() == 0).float()
    return chosen / chosen.sum()


def rated(shares: Tensor, weights: Tensor) -> Tensor:
    """What the raters give each visual token on average: [n, T], [T] -> float32 [n]."""
    # Where n = 0, ONNX Runtime fails at a product with a vector and at a sum over axis -1.
    return (shares * weights).sum(1)
