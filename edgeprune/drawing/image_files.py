"""Writing a drawing to a file: the name says the format, and the file is whole or absent."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from edgeprune.errors import InputError
from edgeprune.files import write_whole

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def check_target(file: Path) -> None:
    """InputError, before any work, where a file's name does not say which format it is."""
    if file.suffix.lower() not in FORMATS:
        known = ", ".join(FORMATS)
        raise InputError(f"the picture's name must end in one of {known}; got {str(file)!r}")


def save(picture: Image.Image, file: Path) -> None:
    """Write the picture under its name, whole or not at all; the name says the format."""
    check_target(file)
    encoded = io.BytesIO()
    picture.save(encoded, FORMATS[file.suffix.lower()], quality=92, optimize=True)
    write_whole(file, encoded.getvalue())
