"""How near visual tokens are to the question, in the decoder's input space."""

from __future__ import annotations

import torch
from torch import Tensor

SMALL = 1e-6
"""Added to the least relevance, so that no token is out of the question altogether."""


def relevance(visual: Tensor, text: Tensor) -> Tensor:
    """Mean cosine to the text, scaled to 0 .. 1 over the image: unit [n, D], [T, D] -> [n]."""
    cosine = (visual @ text.T).mean(1)
    lowest = torch.cat([cosine, cosine.new_full((1,), 2)]).amin(0)  # n may be 0
    highest = torch.cat([cosine, cosine.new_full((1,), -2)]).amax(0)
    scaled: Tensor = (cosine - lowest + SMALL) / (highest - lowest).clamp(min=SMALL)
    return scaled
