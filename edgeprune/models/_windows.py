"""Patches of an image sorted by the window that they attend within."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Windows:
    """Patches sorted by window: `runs` of (windows, patches of each), all of a run of one shape.

    An image whose sides are multiples of the window's has one run; else the windows cut off at the
    right, at the bottom and in the corner are runs of their own.
    """

    order: tuple[int, ...]  # patch at each index of the sequence
    runs: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, grid: tuple[int, int], side: int) -> Windows:
        """Squares of `side` patches over a grid of (rows, columns) patches."""
        shapes: dict[tuple[int, int], list[list[int]]] = {}
        for top in range(0, grid[0], side):
            for left in range(0, grid[1], side):
                rows = range(top, min(top + side, grid[0]))
                columns = range(left, min(left + side, grid[1]))
                window = [row * grid[1] + column for row in rows for column in columns]
                shapes.setdefault((len(rows), len(columns)), []).append(window)
        groups = list(shapes.values())
        order = tuple(patch for group in groups for window in group for patch in window)
        return cls(order, tuple((len(group), len(group[0])) for group in groups))

    @property
    def numbers(self) -> tuple[int, ...]:
        """The window of each index of the sequence."""
        sizes = [size for windows, size in self.runs for _ in range(windows)]
        return tuple(number for number, size in enumerate(sizes) for _ in range(size))
