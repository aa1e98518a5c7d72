"""Writing a figure to a file: the name says the format, and the file is whole or absent."""

from __future__ import annotations

import io
from pathlib import Path

from edgeprune.drawing import png, svg
from edgeprune.drawing.canvas import Sheet
from edgeprune.errors import InputError
from edgeprune.files import write_whole

DOTS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Formats of dots by suffix, as Pillow names them; `.svg` is the other one."""


def check_target(file: Path) -> None:
    """InputError, before any work, where a file's name does not say which format it is."""
    if file.suffix.lower() not in (*DOTS, ".svg"):
        known = ", ".join((*DOTS, ".svg"))
        raise InputError(f"the figure's name must end in one of {known}; got {str(file)!r}")


def save(sheet: Sheet, file: Path, scale: int = 1) -> None:
    """Write the figure, whole or not at all; `scale` dots a pixel where the format has dots."""
    check_target(file)
    if file.suffix.lower() == ".svg":
        write_whole(file, svg.render(sheet).encode())
        return
    encoded = io.BytesIO()
    image = png.render(sheet, scale)
    image.save(encoded, DOTS[file.suffix.lower()], quality=92, optimize=True)
    write_whole(file, encoded.getvalue())
