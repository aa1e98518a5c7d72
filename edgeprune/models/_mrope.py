"""M-RoPE: every token has three positions, and each pair of a head turns by one of them.

Time, row and column (Qwen2-VL, Sec. 2.1). A text token's three are equal. A visual token's are
those of its patch in the image or video, added to the position where that starts. Text goes on
after the largest of them, so an image takes fewer positions than it has tokens. (transformers 5.23
overlooks times there, which matters where a video is longer than high or wide.) Pruned tokens leave
gaps: nobody moves up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from edgeprune.policies._signals import Segments


def in_runs(sections: Sequence[int]) -> tuple[int, ...]:
    """Axes of a head's pairs where so many turn by time, then by row, by column (Qwen2-VL)."""
    return tuple(axis % 3 for axis, pairs in enumerate(sections) for _ in range(pairs))


def interleaved(sections: Sequence[int]) -> tuple[int, ...]:
    """The same where axes take turns, so that each has high and low frequencies (Qwen3-VL): time,
    row, column and so on, as long as row and column have pairs left; the rest turns by time."""

    def axis(pair: int) -> int:
        return pair % 3 if pair < 3 * sections[pair % 3] else 0

    return tuple(axis(pair) for pair in range(sum(sections)))


class Grid(NamedTuple):
    """The tokens of an image, or of a video whose spans of frames stand at some times."""

    rows: int
    columns: int
    times: tuple[int, ...] = (0,)

    @property
    def span(self) -> int:
        """Positions that it takes."""
        return max(self.rows, self.columns, self.times[-1] + 1)


@dataclass(frozen=True, slots=True)
class MRope:
    """How a head's pairs are shared out, and where the V visual tokens of a prompt stand."""

    axes: tuple[int, ...]  # of each pair of a head what it turns by: 0 time, 1 row, 2 column
    offsets: tuple[tuple[int, int, int], ...]  # of each, from the position of the first image
    span: int  # positions that they take together

    @classmethod
    def of(cls, axes: tuple[int, ...], *parts: Grid | int) -> MRope:
        """Images one after the other, with so many text tokens between them."""
        offsets, start = list[tuple[int, int, int]](), 0
        for part in parts:
            if isinstance(part, int):
                offsets += [(start + i,) * 3 for i in range(part)]
                start += part
            else:
                places = product(part.times, range(part.rows), range(part.columns))
                offsets += [(start + t, start + r, start + c) for t, r, c in places]
                start += part.span
        return cls(axes, tuple(offsets), start)

    def positions(self, first: Tensor, segments: Segments, visual_indices: Tensor) -> Tensor:
        """Time, row and column of each token of a call, then of the three anchors.

        `first` int64 [1] is the position of the call's first token; `visual_indices` int64 [visual]
        says which of the V tokens, in reading order, the visual ones are: int64 [3, S + 3].
        """
        start = first + segments.prefix
        before = first + torch.arange(segments.prefix, device=first.device)
        # 0 in decode steps, 1 in prefill; a minimum, for TensorRT clips no integers
        seen = torch.scalar_tensor(segments.visual, dtype=torch.int64).minimum(torch.tensor(1))
        after = start + self.span * seen + torch.arange(segments.text, device=first.device)
        visual = start + torch.tensor(self.offsets).T.index_select(1, visual_indices)
        anchors = start + seen * torch.tensor(self._anchors())  # never past the rotary tables
        return torch.cat([before.expand(3, -1), visual, after.expand(3, -1), anchors], dim=1)

    def read(self, table: Tensor, positions: Tensor) -> Tensor:
        """A rotary table at three positions a token: [n, head / 2], [3, S] -> [S, head / 2]."""
        return table.gather(0, positions.index_select(0, torch.tensor(self.axes)).T)

    def _anchors(self) -> list[list[int]]:
        """The first, the middle and the last position of each axis."""
        axes = list(zip(*self.offsets, strict=True))
        return [[min(axis), (min(axis) + max(axis) + 1) // 2, max(axis)] for axis in axes]
