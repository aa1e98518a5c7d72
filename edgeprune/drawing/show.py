"""What pruning leaves of an image, drawn: patches as they are, grey, or outlined.

`edgeprune.drawing.show_figure` draws them into one image with the answers and the schedule.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgeprune.drawing.canvas import Levels
from edgeprune.manifest import Manifest
from edgeprune.runtime.answer import Answer
from edgeprune.runtime.survivors import Site

MERGED = (255, 120, 0)
"""Colour of the outline of a merged token's centre."""
DROPPED = (78, 78, 78)
"""In a legend, the grey of dropped patches: they are darker or lighter, as the image is."""


@dataclass(frozen=True, slots=True)
class Caption:
    """One answer and who gave it, as `utp, CR 4.00`."""

    label: str
    text: str

    @classmethod
    def by(cls, manifest: Manifest, answer: Answer) -> Caption:
        prune = manifest.prune
        dense = prune.method == "none" and prune.cr_reached == 1
        label = "dense" if dense else f"{prune.method}, CR {prune.cr_reached:.2f}"
        if (encoder := manifest.encoder).operations < encoder.dense_operations:
            label += f", encoder {encoder.share:.2f}"
        return cls(label, answer.text or "(nothing)")


def dim(levels: Levels, site: Site, grid: tuple[int, int], line: int = 1) -> Levels:
    """Kept patches as they are, pruned ones grey, dark and ruled: [h, w, 3] -> [h, w, 3].

    Levels 0 to 255 become 36 to 120, 14 more on the `line` pixels at a patch's top and left. The
    centre of a merged token is as it is, within an outline in MERGED of twice that width.
    """
    height, width, _ = levels.shape
    grey = levels @ np.array([0.299, 0.587, 0.114])
    shown = levels.copy()
    for row, column in np.ndindex(grid):
        if (row, column) in site.kept:
            continue
        top, bottom = (round(height * i / grid[0]) for i in (row, row + 1))
        left, right = (round(width * i / grid[1]) for i in (column, column + 1))
        window = np.s_[top:bottom, left:right]
        if (row, column) in site.merged:
            shown[window] = _outlined(shown[window], 2 * line)
            continue
        patch = 36 + 0.33 * grey[window]  # [h, w] of the patch
        patch[:line] += 14
        patch[line:, :line] += 14
        shown[window] = patch[..., None]
    return shown


def _outlined(patch: Levels, line: int) -> Levels:
    """A patch within a frame of `line` pixels."""
    framed = np.full_like(patch, MERGED)
    framed[line:-line, line:-line] = patch[line:-line, line:-line]
    return framed
