"""A square grid of learned positions, resampled to the patches of an image."""

from __future__ import annotations

import math
from itertools import product
from typing import Protocol

import torch
from torch import Tensor, nn

from edgeprune.models._ops import cast


class Sizes(Protocol):
    """What the grid needs of a tower's description."""

    @property
    def width(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def position_side(self) -> int: ...
    @property
    def cubic(self) -> bool: ...


class PositionGrid(nn.Module):
    """Resampled bilinearly, the corners of both grids on each other, or bicubically, their edges.
    The sums are float32."""

    def __init__(self, config: Sizes) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.position_side**2, config.width))

    def forward(self, x: Tensor, patches: Tensor | None = None) -> Tensor:
        """Adds each patch's position: [tiles, n, width] -> the same. In reading order, or those of
        the indices `patches` int64 [n]."""
        config, side = self.config, self.config.position_side
        read_at = cubic_taps if config.cubic else taps
        rows, columns = read_at(config.rows, side), read_at(config.columns, side)
        whole: Tensor | None = None
        for row, column in product(range(len(rows[0])), repeat=2):
            indices = torch.tensor([r[row][0] * side + c[column][0] for r in rows for c in columns])
            shares = torch.tensor([r[row][1] * c[column][1] for r in rows for c in columns])
            if patches is not None:
                indices, shares = (t.index_select(0, patches) for t in (indices, shares))
            read = cast(self.weight.index_select(0, indices), torch.float32)
            part = read * shares[:, None]
            whole = part if whole is None else whole + part
        assert whole is not None
        return x + cast(whole, x.dtype)


Taps = tuple[tuple[int, float], ...]
"""Values that a point between them is made of, each with its share."""


def taps(count: int, side: int) -> list[Taps]:
    """For each of `count` points over a line of `side` values, the value at or before it and the
    next one, each with its share."""
    found = list[Taps]()
    steps = max(1, count - 1)
    for point in range(count):
        low, rest = divmod(point * (side - 1), steps)
        found.append(((low, 1 - rest / steps), (min(low + 1, side - 1), rest / steps)))
    return found


def cubic_taps(count: int, side: int) -> list[Taps]:
    """The same where edges lie on each other: the two values on each side, the last one beyond the
    edge; shares as Keys (1981) has them with a = -3/4."""

    def share(distance: float) -> float:
        if distance <= 1:
            return (1.25 * distance - 2.25) * distance**2 + 1
        return -0.75 * (((distance - 5) * distance + 8) * distance - 4)

    found = list[Taps]()
    for point in range(count):
        place = (point + 0.5) * side / count - 0.5
        low = math.floor(place)
        near = range(low - 1, low + 3)
        found.append(tuple((min(max(n, 0), side - 1), share(abs(place - n))) for n in near))
    return found
