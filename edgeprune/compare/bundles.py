"""The bundle of a cell: made where it is missing, or the reason why there can be none.

What a bundle holds is known by a hash of its files and of what the runtime reads of its manifest.
The hash is kept when the bundle is deleted, so that an answer to the same bytes is not asked again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from edgeprune import calib, export, models, policies
from edgeprune.bundle import Bundle
from edgeprune.compare.cells import Cell
from edgeprune.compare.store import Store, key_of, source
from edgeprune.errors import BundleError, ScheduleError, SpecError
from edgeprune.making import make
from edgeprune.manifest import Manifest
from edgeprune.models import open_model
from edgeprune.recipe import Recipe
from edgeprune.versions import installed

READ_BESIDE_WEIGHTS = {".json", ".jinja", ".model", ".tiktoken", ".txt"}
"""Endings of the files that hold tokenizers, templates and settings of processors."""

PACKAGES = ("edgeprune", "torch", "transformers", "onnx", "onnxscript", "numpy", "highspy")
WEIGHTS = "weights.bin"


@dataclass(frozen=True)
class Made:
    """A bundle: the hash of what it holds, and its sizes; or only `why` there is none."""

    hash: str = ""
    cr: float = 0.0  # reached
    counts: tuple[int, ...] = ()
    weight_bytes: int = 0
    why: str = ""


@dataclass(frozen=True)
class Bundles:
    """All bundles of a comparison: one recipe, but for method, ratio, seed, weights and
    tiles."""

    folder: Path
    recipe: Recipe
    store: Store

    def path(self, cell: Cell) -> Path:
        return self.folder / cell.name

    def known(self, cell: Cell) -> Made | None:
        """What is known of a cell's bundle, whether or not it is still there; None if nothing."""
        found = self.store.read(f"{cell.name}.bundle", self._key(cell))
        return Made(**{**found, "counts": tuple(found["counts"])}) if found else None

    def made(self, cell: Cell) -> Made:
        """As `known`, after finding out where nothing is."""
        return self.known(cell) or self._make(cell)

    def present(self, cell: Cell) -> Made:
        """As `made`, with the bundle at its path unless there can be none."""
        known = self.known(cell)
        if known and (known.why or self._holds(cell, known)):
            return known
        return self._make(cell)

    def delete(self, cells: Iterable[Cell]) -> None:
        """Remove the bundles of these cells, and the folder where nothing else is in it."""
        for cell in cells:
            shutil.rmtree(self.path(cell), ignore_errors=True)
        for pool in self.folder.glob(".weights-*"):
            pool.unlink()
        with suppress(OSError):
            self.folder.rmdir()

    def _make(self, cell: Cell) -> Made:
        recipe = replace(self._recipe(cell), output=self.path(cell))
        try:
            manifest = make(recipe).manifest
        except (SpecError, ScheduleError) as error:
            found = Made(why=" ".join(str(error).split()))
        else:
            self._share_weights(cell, manifest)
            prune = manifest.prune
            stored = manifest.files[WEIGHTS].bytes
            found = Made(_hash(manifest), prune.cr_reached, prune.counts, stored)
        self.store.write(f"{cell.name}.bundle", self._key(cell), asdict(found))
        return found

    def _key(self, cell: Cell) -> str:
        recipe, data = self._recipe(cell), self.recipe.samples_file
        bare = replace(recipe, output=None, samples_file=None, image_dir=None, tokenizer=None)
        calibrated = hashlib.sha256(data.read_bytes()).hexdigest() if data else None
        model = _checkpoint(recipe.model, recipe.revision, recipe.tokenizer)
        return key_of(model, asdict(bare), calibrated, str(recipe.sample_images), code())

    def _recipe(self, cell: Cell) -> Recipe:
        return replace(self.recipe, spec=cell.spec, weights=cell.weights, tiles=cell.tiles)

    def _holds(self, cell: Cell, made: Made) -> bool:
        """Whether the bundle is there, and is the one that was made."""
        try:
            return _hash(Bundle.open(self.path(cell)).manifest) == made.hash
        except BundleError:
            return False

    def _share_weights(self, cell: Cell, manifest: Manifest) -> None:
        """Let equal weights be one file on disk, under the names of all bundles that hold them."""
        mine, digest = self.path(cell) / WEIGHTS, manifest.files[WEIGHTS].sha256
        pool = self.folder / f".weights-{digest}"
        with suppress(OSError):  # where links cannot be, each keeps its own
            if not pool.exists():
                os.link(mine, pool)
            else:
                draft = mine.with_suffix(".link")
                os.link(pool, draft)
                draft.replace(mine)


def _hash(manifest: Manifest) -> str:
    """Of the files and of all that the runtime goes by; not of when or where they were made."""
    content = asdict(manifest)
    for name in ("name", "parity", "versions", "weights"):
        del content[name]
    del content["prune"]["schedule"]
    return key_of(content)


@cache
def _checkpoint(model: str, revision: str | None, tokenizer: Path | None) -> str:
    """Of weights, and of all that decides how text and images are read."""
    checkpoint = open_model(model, revision, tokenizer=tokenizer).checkpoint
    folders = [checkpoint.folder, *([tokenizer] if tokenizer else [])]
    files = sorted(f for d in folders for f in d.iterdir() if f.suffix in READ_BESIDE_WEIGHTS)
    read = [(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]
    return key_of(checkpoint.fingerprint(), read)


@cache
def code() -> str:
    """Of the source that decides what a bundle holds, and the versions of what it stands on."""
    versions = {name: installed(name) for name in PACKAGES}
    return key_of(source(calib, export, models, policies), versions)
