"""M-RoPE: every token has three positions, and each pair of a head turns by one of them.

Time, row and column (Qwen2-VL, Sec. 2.1). A text token's three are equal. A visual token's are
those of its place in the picture, added to the position where the picture starts. Text goes on
where the picture's longer side ends, so a picture takes fewer positions than it has tokens. Pruned
tokens leave gaps: nobody moves up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgeprune.policies._signals import Segments


@dataclass(frozen=True, slots=True)
class MRope:
    """How a head's pairs are shared out, and the grid of the picture that is frozen in."""

    sections: tuple[int, ...]  # pairs of a head that turn by time, by row, by column
    rows: int
    columns: int

    @property
    def span(self) -> int:
        """Positions that a picture takes."""
        return max(self.rows, self.columns)

    def positions(self, first: Tensor, segments: Segments, places: Tensor) -> Tensor:
        """Time, row and column of each token of a call, then of the picture's three anchors.

        `first` int64 [1] is the position of the call's first token; `places` int64 [visual] says
        which of the picture's places, in reading order, the visual tokens have: int64 [3, S + 3].
        """
        start = first + segments.prefix
        before = first + torch.arange(segments.prefix, device=first.device)
        seen = torch.scalar_tensor(segments.visual, dtype=torch.int64).clamp(max=1)  # not in decode
        after = start + self.span * seen + torch.arange(segments.text, device=first.device)
        visual = start + self._offsets().index_select(1, places)
        rows, columns = self.rows, self.columns
        anchors = [[0, 0, 0], [0, rows // 2, rows - 1], [0, columns // 2, columns - 1]]
        parts = [before.expand(3, -1), visual, after.expand(3, -1), start + torch.tensor(anchors)]
        return torch.cat(parts, dim=1)

    def read(self, table: Tensor, positions: Tensor) -> Tensor:
        """A rotary table at three positions a token: [n, head / 2], [3, S] -> [S, head / 2]."""
        axes = [axis % 3 for axis, pairs in enumerate(self.sections) for _ in range(pairs)]
        return table.gather(0, positions.index_select(0, torch.tensor(axes)).T)

    def _offsets(self) -> Tensor:
        """The three positions of each place of a picture that starts at 0: int64 [3, V]."""
        places = torch.arange(self.rows * self.columns)
        return torch.stack([places * 0, places // self.columns, places % self.columns])
