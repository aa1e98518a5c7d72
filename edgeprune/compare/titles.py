"""What a row of a comparison is called."""

from __future__ import annotations

DENSE = "none"
"""The method that prunes nothing."""
FLOAT = "float"
"""Weights that are not quantised."""


def titled(label: str, weights: str, tiles: int | None = None) -> str:
    """A method's label with the format of quantised weights, and the tiles where not all are
    encoded."""
    label = label if weights == FLOAT else f"{label} {weights}"
    return label if tiles is None else f"{label} tiles={tiles}"
