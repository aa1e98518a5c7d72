"""How sure shares of right answers are: 95% intervals of one share, and of a paired difference."""

from __future__ import annotations

import math


def difference(marks: str, base: str, z: float = 1.96) -> tuple[float, float]:
    """How much larger a share of right answers is than that of another bundle to the same
    questions, and half of its 95% interval: only questions that one of them alone got right count.
    """
    number = len(base)
    gained = sum(a > b for a, b in zip(marks, base, strict=True))
    lost = sum(a < b for a, b in zip(marks, base, strict=True))
    found = (gained - lost) / number
    deviation = math.sqrt(max(0.0, (gained + lost) / number - found**2) / number)
    return found, z * deviation


def wilson(right: int, asked: int, z: float = 1.96) -> tuple[float, float]:
    """Ends of the 95% interval of a share of right answers (Wilson, 1927)."""
    share, weight = right / asked, z * z / asked
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / asked + weight / asked / 4)
    low = middle - half if right else 0.0  # which rounding would move
    high = middle + half if right < asked else 1.0
    return low, high
