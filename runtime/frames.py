"""Frames of one fixed camera: of each only the patches that changed are encoded.

This is an approximation, for bundles that were exported with --delta. Patches that become one
visual token are a unit and change together. A unit counts as changed where one of its patches
differs by more than `threshold` from what it was when it was encoded last, so that slow drift
counts too. Of a tile with few changed units K patches go through the encoder, K as frozen at
export: those that changed and the nearest others, whose features show most of what was there. Of a
tile with more, and at least every `refresh` frames, all patches do. A tile without
changes is not encoded again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import SpecError
from edgeprune.manifest import DeltaRecord, Manifest
from edgeprune.patches import as_patches
from edgeprune.runtime.backend import Backend, ChangedPatches, EncodedImage, EncodedTile, Ids

THRESHOLD, REFRESH = 0.02, 100
PARTS = 2
"""A patch is looked at in 2 x 2 parts, so that the noise of single pixels is averaged away."""

Pixels = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class DeltaOptions:
    """What counts as a change, and how often a frame is encoded as a whole."""

    threshold: float = THRESHOLD  # of a colour's mean in a part of a patch, from 0 (at all) to 1
    refresh: int = REFRESH  # frames from one that is encoded as a whole to the next, at most

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise SpecError(f"--delta is a change from 0 to 1; got {self.threshold:g}")
        if self.refresh < 1:
            raise SpecError(f"--refresh is a number of frames from 1; got {self.refresh}")


@dataclass(frozen=True, slots=True, eq=False)
class LastTile:
    """A tile as it was encoded last."""

    means: Pixels  # [N, means], of each patch what `part_means` gave when it was encoded
    tile: EncodedTile


class FrameEncoder:
    """What a backend makes of the frames of one camera. Used by one thread at a time."""

    def __init__(self, backend: Backend[Any], manifest: Manifest, options: DeltaOptions) -> None:
        """SpecError unless the bundle was exported for it. Both graphs are run once on nothing, so
        that the first frames take no longer than the next."""
        if (delta := manifest.encoder.delta) is None:
            raise SpecError(
                f"{manifest.name} encodes every frame as a whole; export it with --delta 0.25, or"
                " leave out --delta"
            )
        self._backend, self._delta, self._options = backend, delta, options
        self._total = manifest.encoder.patches
        self._units = Units.of(manifest.image.height, manifest.image.width, delta)
        parts = min(PARTS, delta.patch) ** 2
        self._std = np.array(manifest.image.std, np.float32).repeat(parts)
        self._known: list[LastTile | None] = [None] * manifest.encoder.tiles
        self._left = 0  # frames until one is encoded as a whole
        self._image: tuple[bytes, EncodedImage] | None = None  # and the counts it was joined at
        tile = np.zeros((1, *manifest.image.shape[1:]), np.float32)
        first = np.arange(delta.patches)
        given = ChangedPatches(as_patches(tile[0], delta.patch, first), first)
        backend.encode_changed(backend.encode_tile(tile, caches=True), given)

    def encode(self, pixels: Pixels, counts: Ids) -> EncodedImage:
        """The next frame [tiles, 3, H, W], at r_1 ... r_L."""
        image, self._image = self._image, None  # so that after an error no old one is taken
        self._left -= 1
        encoded = [self._advance(number, pixels[number]) for number in range(len(self._known))]
        whole = encoded.count(self._total)
        if whole == len(encoded):
            self._left = self._options.refresh
        key, tiles = counts.tobytes(), [known.tile for known in self._known if known is not None]
        if any(encoded) or image is None or image[0] != key:
            image = key, self._backend.join(tiles, counts)
        self._image = image
        return replace(image[1], tiles_encoded=whole, patches_encoded=sum(encoded))

    def _advance(self, number: int, pixels: Pixels) -> int:
        """Have a tile's signals; how many of its patches were encoded."""
        means, known = part_means(pixels, self._delta.patch), self._known[number]
        if known is None or self._left <= 0:
            return self._whole(number, pixels, means)
        change = self._units.largest((np.abs(means - known.means) * self._std).max(1))
        changed = change > self._options.threshold
        if changed.sum() > self._units.encoded:
            return self._whole(number, pixels, means)
        if not changed.any():
            return 0
        far = distances(changed, self._units.encoded)
        order = np.lexsort((-change.flatten(), far.flatten()))  # the nearest first
        chosen = np.sort(self._units.members[order[: self._units.encoded]].flatten())
        self._known[number] = None  # after an error the tile is encoded as a whole
        given = ChangedPatches(as_patches(pixels, self._delta.patch, chosen), chosen)
        tile = self._backend.encode_changed(known.tile, given)
        known.means[chosen] = means[chosen]
        self._known[number] = replace(known, tile=tile)
        return chosen.size

    def _whole(self, number: int, pixels: Pixels, means: Pixels) -> int:
        tile = self._backend.encode_tile(pixels[None], caches=True)
        self._known[number] = LastTile(means, tile)
        return self._total


@dataclass(frozen=True, slots=True, eq=False)
class Units:
    """The patches of a tile as squares that are encoded together."""

    members: Ids  # [units, patches of each], indices of patches in reading order
    grid: tuple[int, int]  # rows, columns of units
    encoded: int  # units of a tile of which few changed

    @classmethod
    def of(cls, height: int, width: int, delta: DeltaRecord) -> Units:
        """Of a tile of so many pixels."""
        side = delta.unit
        rows, columns = (pixels // delta.patch // side for pixels in (height, width))
        patches = np.arange(rows * columns * side**2).reshape(rows, side, columns, side)
        members = patches.transpose(0, 2, 1, 3).reshape(rows * columns, -1)
        return cls(members, (rows, columns), delta.patches // side**2)

    def largest(self, values: Pixels) -> Pixels:
        """Of each unit's patches: [N] -> [rows, columns]."""
        found: Pixels = values[self.members].max(1).reshape(self.grid)
        return found


def part_means(pixels: Pixels, patch: int) -> Pixels:
    """The mean of each colour in the parts of each patch: [3, H, W] -> [N, 3 * parts^2]."""
    parts = min(PARTS, patch)
    side = patch // parts
    rows, columns = (length // patch for length in pixels.shape[1:])
    cut = pixels[:, : rows * patch, : columns * patch].reshape(3, rows, patch, -1)
    lines = cut[:, :, : parts * side].reshape(3, rows, parts, side, -1).sum(3)
    split = lines.reshape(3, rows, parts, columns, patch)[..., : parts * side]
    sums = split.reshape(3, rows, parts, columns, parts, side).sum(5)
    found: Pixels = sums.transpose(1, 3, 0, 2, 4).reshape(rows * columns, -1) / side**2
    return found


def distances(changed: NDArray[np.bool_], count: int) -> Pixels:
    """How many units each is from the nearest that changed, diagonals included; endless behind
    the nearest `count`. Some changed: [rows, columns]."""
    found = np.where(changed, 0, np.inf).astype(np.float32)
    step = 0
    while np.isfinite(found).sum() < count:
        step += 1
        reached = np.pad(np.isfinite(found), 1)
        wider = np.lib.stride_tricks.sliding_window_view(reached, (3, 3)).any((2, 3))
        found[wider & np.isinf(found)] = step
    return found
