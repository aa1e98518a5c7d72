"""Frames of one fixed camera: of each only the patches that changed are encoded.

An approximation, for who asks for it. A patch counts as changed where it differs by more than
`threshold` from what it was when it was encoded last, so that slow drift counts too. Of a frame
with few of them K patches go through the encoder, K as frozen at export: those that changed and the
nearest others, whose features show most of what was there. Of a frame with more than K, and at
least every `refresh` frames, all patches do. A frame without any is the last one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import SpecError
from edgeprune.manifest import Manifest
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
        self._grid = manifest.image.height // delta.patch, manifest.image.width // delta.patch
        self._std = np.array(manifest.image.std, np.float32)[:, None, None]
        self._tile: EncodedTile | None = None
        self._known: Pixels | None = None  # [N, 3, patch, patch], as encoded last
        self._left = 0  # frames until one is encoded as a whole
        self._image: tuple[bytes, EncodedImage] | None = None  # and the counts it was joined at
        frame = np.zeros(manifest.image.shape, np.float32)
        first = np.arange(delta.patches)
        given = ChangedPatches.of(as_patches(frame[0], delta.patch)[first], first, self._total)
        backend.encode_changed(backend.encode_tile(frame, caches=True), given)

    def encode(self, pixels: Pixels, counts: Ids) -> EncodedImage:
        """The next frame [1, 3, H, W], at r_1 ... r_L."""
        encoded, key = self._advance(pixels), counts.tobytes()
        assert self._tile is not None  # of this frame
        if encoded or self._image is None or self._image[0] != key:
            self._image = key, self._backend.join([self._tile], counts)
        whole = int(encoded == self._total)
        return replace(self._image[1], tiles_encoded=whole, patches_encoded=encoded)

    def _advance(self, pixels: Pixels) -> int:
        """Have the frame's signals; how many patches were encoded."""
        patches = as_patches(pixels[0], self._delta.patch)
        self._left -= 1
        if self._tile is None or self._known is None or self._left <= 0:
            return self._whole(pixels, patches)
        change = changes(patches - self._known, self._std)
        changed = change > self._options.threshold
        if changed.sum() > self._delta.patches:
            return self._whole(pixels, patches)
        if changed.any():
            far = distances(changed.reshape(self._grid), self._delta.patches)
            order = np.lexsort((-change, far.flatten()))  # the nearest first
            chosen = np.sort(order[: self._delta.patches])
            given = ChangedPatches.of(patches[chosen], chosen, self._total)
            self._tile = self._backend.encode_changed(self._tile, given)
            self._known[chosen] = patches[chosen]
            return chosen.size
        return 0

    def _whole(self, pixels: Pixels, patches: Pixels) -> int:
        self._tile = self._backend.encode_tile(pixels, caches=True)
        self._known, self._left = patches, self._options.refresh
        return self._total


def as_patches(pixels: Pixels, patch: int) -> Pixels:
    """A copy row by row: [3, H, W] -> [N, 3, patch, patch]."""
    rows, columns = (side // patch for side in pixels.shape[1:])
    cut = pixels[:, : rows * patch, : columns * patch]
    split = cut.reshape(3, rows, patch, columns, patch).transpose(1, 3, 0, 2, 4)
    return split.reshape(-1, 3, patch, patch).copy()


def changes(difference: Pixels, std: Pixels) -> Pixels:
    """How far each patch is from what it was, from 0 to 1: the largest difference of a colour's
    mean in a part of it. `difference` is of normalised pixels [N, 3, patch, patch]."""
    count, colours, patch, _ = difference.shape
    parts = min(PARTS, patch)
    side = patch // parts
    cut = (difference * std)[..., : parts * side, : parts * side]
    means = cut.reshape(count, colours, parts, side, parts, side).mean((3, 5))
    found: Pixels = np.abs(means).max((1, 2, 3))
    return found


def distances(changed: NDArray[np.bool_], count: int) -> Pixels:
    """How many patches each is from the nearest that changed, diagonals included; endless behind
    the nearest `count`. Some changed: [rows, columns]."""
    found = np.where(changed, 0, np.inf).astype(np.float32)
    step = 0
    while np.isfinite(found).sum() < count:
        step += 1
        reached = np.pad(np.isfinite(found), 1)
        wider = np.lib.stride_tricks.sliding_window_view(reached, (3, 3)).any((2, 3))
        found[wider & np.isinf(found)] = step
    return found
