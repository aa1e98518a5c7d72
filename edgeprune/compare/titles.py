"""What a row of a comparison is called."""

from __future__ import annotations

DENSE = "none"
"""The method that prunes nothing."""
FLOAT = "float"
"""Weights that are not quantised."""


def titled(label: str, weights: str) -> str:
    """A method's label with the format of quantised weights."""
    return label if weights == FLOAT else f"{label} {weights}"
