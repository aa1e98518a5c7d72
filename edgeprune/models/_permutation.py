"""Permutations, as the source index of each place."""

from __future__ import annotations

from collections.abc import Sequence


def inverse(order: Sequence[int]) -> list[int]:
    """The place of each index in a permutation of 0 ... n - 1."""
    return sorted(range(len(order)), key=order.__getitem__)
