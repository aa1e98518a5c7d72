"""Budgets as published: `--set counts=` names the visual tokens that stay, and the CR follows."""

from __future__ import annotations

from edgeprune.errors import SpecError
from edgeprune.spec import AUTO, ModelShape


def listed(counts: str, sites: int, most: int) -> tuple[int, ...]:
    """The numbers of `309/204/113`, one for each of the sites, none above the one before it or
    `most`; merged tokens are among them."""
    parts = counts.split("/")
    numbers = [int(part) if part.isdecimal() else 0 for part in parts]
    falls = [most, *numbers] == sorted([most, *numbers], reverse=True)
    if len(numbers) != sites or min(numbers) < 1 or not falls:
        example = "/".join(str(max(1, most >> n)) for n in range(1, sites + 1))
        wanted = "a number" if sites == 1 else f"{sites} numbers with / between"
        raise SpecError(
            f"--set counts= takes {wanted}, such as {example}: the visual tokens that stay, at most"
            f" {most} and none above the one before; got {counts!r}"
        )
    return tuple(numbers)


def ratio(counts: str, shape: ModelShape, cr: float, full: int = 0) -> float:
    """The CR of the one count that enters all layers after the first `full`, which see every
    token; the `cr` asked for where counts are left to it."""
    if counts == AUTO:
        return cr
    (count,) = listed(counts, 1, shape.visual_tokens)
    total = full * shape.visual_tokens + max(0, shape.layers - full) * count
    return shape.visual_tokens * shape.layers / total
