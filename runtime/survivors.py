"""What pruning leaves of an image: the tokens alive after each site, as patches of the image."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeprune.errors import BundleError
from edgeprune.manifest import ImageRecord, Manifest
from edgeprune.runtime.backend import Ids
from edgeprune.runtime.images import to_pixels

Levels = NDArray[np.uint8]  # [height, width, 3]
Positions = set[tuple[int, int]]  # (row, column) on the grid of visual tokens


@dataclass(frozen=True, slots=True)
class Site:
    """What is alive after a site: patches that were kept, and merged tokens at their centres."""

    title: str
    layer: int  # the first that has only these
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


class Kept(Protocol):
    """What an answer and a sequence say of the tokens that they kept."""

    @property
    def vision_kept(self) -> Ids: ...

    @property
    def layer_kept(self) -> tuple[Ids, ...]: ...


def survivors(answer: Kept, manifest: Manifest) -> Sites:
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
        found = [alive.site("vision", 1, grid, prune.visual_tokens)] if dropped else []
        for stage, kept in zip(within, answer.layer_kept, strict=True):
            alive = alive.after(kept, stage.merged)
            title = f"layer {stage.layer}"
            found.append(alive.site(title, stage.layer, grid, prune.visual_tokens))
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

    def site(self, title: str, layer: int, grid: tuple[int, int], tokens: int) -> Site:
        drawn = grid[0] * grid[1]
        here = {divmod(int(i), grid[1]): int(i) in self.merged for i in self.indices if i < drawn}
        merged = {cell for cell, is_merged in here.items() if is_merged}
        return Site(title, layer, set(here) - merged, merged, int((self.indices == tokens).sum()))


def can_be_drawn(manifest: Manifest) -> bool:
    """Whether visual tokens are a rectangle of the image, or have a view of the whole image first.

    Queries of a resampler (Qwen-VL) and tiles with text between them are no rectangle: 1 x V.
    """
    rows, _ = drawn(manifest)
    return rows > 1 or manifest.prune.visual_tokens == 1


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
    shown = tiles[:1, :3] if first else tiles[:, :3]
    pixels = np.concatenate(list(shown), axis=1).transpose(1, 2, 0)
    levels = (pixels * np.array(record.std) + np.array(record.mean)) / record.rescale
    whole: Levels = np.rint(levels).clip(0, 255).astype(np.uint8)
    return whole
