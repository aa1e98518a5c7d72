"""Images tile by tile: a tile whose pixels were seen before is not encoded again.

Attention of an encoder is within a tile, and vision.onnx runs on one tile. So what it gave for
equal pixels is what it would give again, to the bit; join.onnx then runs on all tiles of an image.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.manifest import Manifest
from edgeprune.runtime.backend import Backend, EncodedImage, EncodedTile, Ids
from edgeprune.tiling import TILE_MEMORY_MB


class TileEncoder:
    """What a backend makes of images, and of tiles that may come again: at most `memory_mb`, the
    longest unused ones are forgotten. Used by one thread at a time."""

    def __init__(
        self, backend: Backend[Any], manifest: Manifest, memory_mb: int = TILE_MEMORY_MB
    ) -> None:
        self._backend, self._tiles = backend, manifest.encoder.tiles
        signals = (t for t in manifest.vision.outputs if t.layer is None)
        one = sum(tensor.bytes({}) for tensor in signals)
        self._limit = (memory_mb << 20) // one
        self._known: OrderedDict[bytes, EncodedTile] = OrderedDict()  # the longest unused first
        self._last: tuple[tuple[bytes, ...], EncodedImage] | None = None  # by its tiles and counts

    def encode(self, pixels: NDArray[np.float32], counts: Ids) -> EncodedImage:
        """[tiles, 3, H, W], or the frames of all tiles -> the image's tokens, at r_1 ... r_L."""
        parts = np.split(np.ascontiguousarray(pixels), self._tiles)
        if not self._limit:
            tiles = [self._backend.encode_tile(part) for part in parts]
            return replace(self._backend.join(tiles, counts), tiles_encoded=len(tiles))
        keys = tuple(sha256(part.tobytes()).digest() for part in parts)
        whole = (*keys, counts.tobytes())
        if self._last is not None and self._last[0] == whole:
            return replace(self._last[1], tiles_encoded=0)
        tiles, encoded = self._looked_up(keys, parts)
        image = replace(self._backend.join(tiles, counts), tiles_encoded=encoded)
        self._last = whole, image
        return image

    def forget(self) -> None:
        """Every tile is encoded again."""
        self._known.clear()
        self._last = None

    def _looked_up(
        self, keys: tuple[bytes, ...], parts: list[NDArray[np.float32]]
    ) -> tuple[list[EncodedTile], int]:
        """The tiles, and how many of them had to be encoded."""
        found = {key: self._known[key] for key in keys if key in self._known}
        known = len(found)
        for key, part in zip(keys, parts, strict=True):
            if key not in found:
                found[key] = self._backend.encode_tile(part)
            self._known[key] = found[key]
            self._known.move_to_end(key)
        while len(self._known) > self._limit:
            self._known.popitem(last=False)
        return [found[key] for key in keys], len(found) - known
