"""What pruning leaves of an image: the tokens alive after each site, as patches of the image.

`edgeprune.drawing.show_figure` draws them into one image with the answers and the schedule.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeprune.bundle import ImageRecord, Manifest
from edgeprune.drawing.canvas import Levels
from edgeprune.errors import BundleError
from edgeprune.runtime.answer import Answer
from edgeprune.runtime.backend import Ids
from edgeprune.runtime.images import to_pixels

MERGED = (255, 120, 0)
"""Colour of the outline of a merged token's centre."""
DROPPED = (78, 78, 78)
"""In a legend, the grey of dropped patches: they are darker or lighter, as the image is."""

Positions = set[tuple[int, int]]  # (row, column) on the grid of visual tokens


@dataclass(frozen=True, slots=True)
class Site:
    """What is alive after a site: patches that were kept, and merged tokens at their centres."""

    title: str
    kept: Positions
    merged: Positions = field(default_factory=set)
    extra: int = 0  # tokens that are no patch: the encoder's [CLS]

    @property
    def caption(self) -> str:
        """As `vision: 54 + 9 merged + [CLS]`."""
        parts = [str(len(self.kept))] if self.kept or not self.merged else []
        parts += [f"{len(self.merged)} merged"] if self.merged else []
        parts += ["[CLS]"] * self.extra
        return f"{self.title}: {' + '.join(parts)}"


Sites = list[Site]


@dataclass(frozen=True, slots=True)
class Said:
    """One answer and who gave it, as `utp, CR 4.00`."""

    label: str
    text: str

    @classmethod
    def by(cls, manifest: Manifest, answer: Answer) -> Said:
        prune = manifest.prune
        dense = prune.method == "none"
        label = "dense" if dense else f"{prune.method}, CR {prune.cr_reached:.2f}"
        return cls(label, answer.text or "(nothing)")


def survivors(answer: Answer, manifest: Manifest) -> Sites:
    """What is alive after each site that drops or merges tokens.

    An answer's positions, [r] at each site, are indices among the tokens alive there, merged ones
    last; these are on the whole grid. What was merged at one site is merged at all later ones.
    """
    prune, grid = manifest.prune, drawn(manifest)
    rows, columns = prune.grid
    before = [stage for stage in prune.stages if not stage.in_decoder]
    within = [stage for stage in prune.stages if stage.in_decoder]
    try:
        if rows * columns != prune.visual_tokens or prune.visual_tokens < 1:
            raise IndexError
        alive = _Alive(np.arange(prune.visual_tokens + 1), frozenset())  # the last index: [CLS]
        alive = alive.after(answer.vision_kept, sum(stage.merged for stage in before))
        dropped = any(stage.survivors < prune.visual_tokens for stage in before)
        found = [alive.site("vision", grid, prune.visual_tokens)] if dropped else []
        for stage, kept in zip(within, answer.layer_kept, strict=True):
            alive = alive.after(kept, stage.merged)
            found.append(alive.site(f"layer {stage.layer}", grid, prune.visual_tokens))
    except (IndexError, ValueError) as error:
        raise BundleError(
            f"the kept tokens of {manifest.name} do not fit its grid of {rows} x {columns};"
            " export it again"
        ) from error
    return found


@dataclass(frozen=True, slots=True)
class _Alive:
    """Places [r] on the whole grid, row by row, and which of them hold merged tokens."""

    indices: NDArray[np.int64]
    merged: frozenset[int]

    def after(self, kept: Ids, merged: int) -> _Alive:
        """What is left when `kept` [r'] go on, the last `merged` of them as merged tokens."""
        indices = self.indices[np.ravel(kept)]
        new = indices[indices.size - merged :].tolist()
        return _Alive(indices, self.merged | frozenset(new))

    def site(self, title: str, grid: tuple[int, int], tokens: int) -> Site:
        drawn = grid[0] * grid[1]
        here = {divmod(int(i), grid[1]): int(i) in self.merged for i in self.indices if i < drawn}
        merged = {cell for cell, is_merged in here.items() if is_merged}
        return Site(title, set(here) - merged, merged, int((self.indices == tokens).sum()))


def drawn(manifest: Manifest) -> tuple[int, int]:
    """Rows and columns of the tokens that are drawn: all, or those of a view of the whole image.

    A raster of tiles has rows of its own length, so of such an image only that view is drawn.
    """
    tiling = manifest.image.tiling
    if tiling is not None and tiling.overview == "first":
        return tiling.tokens, tiling.tokens
    return manifest.prune.grid


def seen(image: Image.Image, record: ImageRecord) -> Levels:
    """The image as the model sees it, padded, resized and cropped: uint8 [height, width, 3].

    Tiles stand one below the other; where a view of the whole image comes first, it is alone.
    """
    tiles, first = to_pixels(image, record), record.tiling and record.tiling.overview == "first"
    pixels = np.concatenate(list(tiles[:1] if first else tiles), axis=1).transpose(1, 2, 0)
    levels = (pixels * np.array(record.std) + np.array(record.mean)) / record.rescale
    whole: Levels = np.rint(levels).clip(0, 255).astype(np.uint8)
    return whole


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
