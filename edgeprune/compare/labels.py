"""Places for names beside the ends of lines, where they hide little and are not hidden."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

Point = tuple[float, float]
GAP = 44
"""Between the names in a column and the first end of a line."""


@dataclass(frozen=True)
class Box:
    """A rectangle; y grows downwards."""

    left: float
    top: float
    width: float
    height: float

    @property
    def right(self) -> float:
        return self.left + self.width

    @property
    def bottom(self) -> float:
        return self.top + self.height

    def overlap(self, other: Box) -> float:
        """Area that two boxes share."""
        across = min(self.right, other.right) - max(self.left, other.left)
        down = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, across) * max(0.0, down)

    def nearest(self, point: Point) -> Point:
        """The box's point that is closest to `point`."""
        x, y = point
        return min(max(x, self.left), self.right), min(max(y, self.top), self.bottom)

    def within(self, start: Point, end: Point) -> float:
        """How long a part of a straight line lies inside."""
        low, high = 0.0, 1.0
        edges = ((self.left, self.right), (self.top, self.bottom))
        for (least, most), a, b in zip(edges, start, end, strict=True):
            if a == b:
                if not least <= a <= most:
                    return 0.0
                continue
            enter, leave = sorted(((least - a) / (b - a), (most - a) / (b - a)))
            low, high = max(low, enter), min(high, leave)
        return max(0.0, high - low) * math.dist(start, end)


def placed(
    names: Sequence[tuple[float, float, Point]],
    lines: Sequence[Sequence[Point]],
    room: Box,
    taken: Sequence[Box] = (),
) -> list[Box]:
    """A box for each name, given as (width, height, the end of its line), inside `room`.

    Names choose in turn among positions around their ends: least of other names and of what is
    `taken`, then of lines, is hidden, then the first of those positions.
    """
    pieces = [piece for line in lines for piece in pairwise(line)]
    ends = [point for line in lines for point in line]
    found: list[Box] = []
    for width, height, end in names:

        def cost(choice: tuple[int, Box]) -> float:
            order, box = choice
            names_hit = sum(box.overlap(other) for other in [*taken, *found])
            lines_hit = sum(box.within(*piece) for piece in pieces)
            signs_hit = sum(math.dist(box.nearest(point), point) < 8 for point in ends)
            outside = box.width * box.height - box.overlap(room)
            return 10 * (names_hit + outside) + lines_hit + 30 * signs_hit + order / 2

        found.append(min(enumerate(_around(width, height, end)), key=cost)[1])
    return found


def column(names: Sequence[tuple[float, float, Point]], room: Box) -> list[Box]:
    """As `placed`, all of one height: one below the other, left of all ends, in their order.

    Each is as near to the height of its end as the others let it.
    """
    right = min((x for _, _, (x, _) in names), default=0) - GAP
    height = max((height for _, height, _ in names), default=0)
    order = sorted(range(len(names)), key=lambda i: names[i][2][::-1])
    wanted = [names[i][2][1] - height / 2 for i in order]
    tops = spread(wanted, height, room.top, room.bottom - height)
    top_of = dict(zip(order, tops, strict=True))
    return [
        Box(max(room.left, right - width), top_of[i], width, height)
        for i, (width, _, _) in enumerate(names)
    ]


def spread(wanted: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """The values nearest to rising ones that are `apart` at least, all from `low` to `high`.

    Least squares: neighbours that are too near become a block around their mean. Where there is no
    room for all, they go past `high`.
    """
    blocks = list[list[float]]()  # of the values less what those before them take
    for i, value in enumerate(wanted):
        blocks.append([value - i * apart])
        while len(blocks) > 1 and _mean(blocks[-2]) > _mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    most = high - (len(wanted) - 1) * apart
    even = [max(low, min(most, _mean(block))) for block in blocks for _ in block]
    return [value + i * apart for i, value in enumerate(even)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _around(width: float, height: float, end: Point) -> Iterator[Box]:
    """Places around a point: first to its left, where its line would go on."""
    x, y = end
    for distance in (12, 18, 26, 38, 52, 72, 96, 124, 156):
        for angle in (180, 165, 195, 150, 210, 135, 225, 105, 255, 90, 270, 60, 300, 30, 330, 0):
            dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            most = max(abs(dx), abs(dy))
            # The box's nearest edge or corner, not its middle, is `distance` away.
            middle_x = x + dx * distance + dx / most * width / 2
            middle_y = y + dy * distance + dy / most * height / 2
            yield Box(middle_x - width / 2, middle_y - height / 2, width, height)
