"""Frames of a fixed camera, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.making import make
from edgeprune.recipe import Recipe
from edgeprune.runtime import Engine
from edgeprune.runtime.backend import ChangedPatches
from edgeprune.spec import PruneSpec
from tests.fake_gpu import pretend

METHOD = PruneSpec("fastervlm", cr=2)
"""It reads queries and keys of all patches, of which most are those of the frame before."""


def made(folder: Path, model: Path) -> Path:
    """A bundle that was compared with the eager model; for GPUs too, with engines never built."""
    recipe = Recipe(METHOD, folder, str(model), target="rtx", dtype="fp32", delta=0.25, parity=2)
    pretend(make(recipe).path)
    return folder


def noise(engine: Engine, seed: int = 0) -> Any:
    shape = engine.manifest.image.shape
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def with_patches(pixels: Any, indices: Any, seed: int) -> Any:
    """A frame in which some patches are others."""
    other = np.random.default_rng(seed).standard_normal(pixels.shape, np.float32)
    side, found = 14, pixels.copy()
    columns = pixels.shape[-1] // side
    for row, column in (divmod(int(index), columns) for index in indices):
        at = ..., slice(side * row, side * (row + 1)), slice(side * column, side * (column + 1))
        found[at] = other[at]
    return found


class Counting:
    """A backend that says what it was given."""

    def __init__(self, engine: Engine) -> None:
        self.backend, self.patches = engine.backend, engine.manifest.encoder.patches
        self.calls, self.given = list[tuple[int, ...]](), list[ChangedPatches]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def encode_tile(self, pixels: Any, *, caches: bool = False) -> Any:
        self.calls.append(tuple(range(self.patches)))
        return self.backend.encode_tile(pixels, caches=caches)

    def encode_changed(self, tile: Any, changed: ChangedPatches) -> Any:
        self.calls.append(tuple(changed.indices.tolist()))
        self.given.append(changed)
        return self.backend.encode_changed(tile, changed)
