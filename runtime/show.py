"""What pruning leaves of a picture: the tokens alive after each site, as patches of the picture.

`edgeprune.runtime.figure` draws them into one picture with the answers and the schedule.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeprune.bundle import ImageRecord, Manifest
from edgeprune.errors import BundleError, InputError
from edgeprune.runtime.images import to_pixels
from edgeprune.runtime.session import Answer

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}

Levels = NDArray[np.uint8]  # [height, width, 3]
Positions = set[tuple[int, int]]  # (row, column) on the grid of visual tokens
Sites = list[tuple[str, Positions]]


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
    """What is alive after each site that drops tokens: its title and (row, column) of the tokens.

    An answer's positions, [r] at each site, are among the tokens alive there; these are on the
    whole grid.
    """
    prune = manifest.prune
    rows, columns = prune.grid
    try:
        if rows * columns != prune.visual_tokens or prune.visual_tokens < 1:
            raise IndexError
        alive = np.arange(prune.visual_tokens)[np.ravel(answer.vision_kept)]
        found = [("vision", alive)] if alive.size < prune.visual_tokens else []
        for name, kept in zip(prune.kept_outputs, answer.layer_kept, strict=True):
            alive = alive[np.ravel(kept)]
            found.append((name.replace("kept.", "layer "), alive))
    except (IndexError, ValueError) as error:
        raise BundleError(
            f"the kept tokens of {manifest.name} do not fit its grid of {rows} x {columns};"
            " export it again"
        ) from error
    return [(title, {divmod(int(i), columns) for i in left}) for title, left in found]


def seen(image: Image.Image, record: ImageRecord) -> Levels:
    """The picture as the model sees it, padded, resized and cropped: uint8 [height, width, 3]."""
    pixels = to_pixels(image, record)[0].transpose(1, 2, 0)
    levels = (pixels * np.array(record.std) + np.array(record.mean)) / record.rescale
    whole: Levels = np.rint(levels).clip(0, 255).astype(np.uint8)
    return whole


def dim(levels: Levels, kept: Positions, grid: tuple[int, int], line: int = 1) -> Levels:
    """Kept patches as they are, pruned ones grey, dark and ruled: [h, w, 3] -> [h, w, 3].

    Levels 0 to 255 become 36 to 120, 14 more on the `line` pixels at a patch's top and left.
    """
    height, width, _ = levels.shape
    grey = levels @ np.array([0.299, 0.587, 0.114])
    shown = levels.copy()
    for row, column in np.ndindex(grid):
        if (row, column) in kept:
            continue
        top, bottom = (round(height * i / grid[0]) for i in (row, row + 1))
        left, right = (round(width * i / grid[1]) for i in (column, column + 1))
        patch = 36 + 0.33 * grey[top:bottom, left:right]  # [h, w] of the patch
        patch[:line] += 14
        patch[line:, :line] += 14
        shown[top:bottom, left:right] = patch[..., None]
    return shown


def check_target(file: Path) -> None:
    """InputError, before any work, where a file's name does not say which format it is."""
    if file.suffix.lower() not in FORMATS:
        known = ", ".join(FORMATS)
        raise InputError(f"the picture's name must end in one of {known}; got {str(file)!r}")


def save(picture: Image.Image, file: Path) -> None:
    """Write the picture under its name, whole or not at all; the name says the format."""
    check_target(file)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        draft = Path(name)
        try:
            with os.fdopen(handle, "wb") as stream:
                picture.save(stream, FORMATS[file.suffix.lower()], quality=92, optimize=True)
            draft.chmod(0o644)  # mkstemp's are their owner's alone
            draft.replace(file)
        finally:
            with suppress(OSError):
                draft.unlink()
    except OSError as error:
        why = error.strerror or error
        raise InputError(f"{file} cannot be written ({why}); choose another --output") from error
