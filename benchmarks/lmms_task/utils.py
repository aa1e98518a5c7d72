"""What the task's file names: lmms-eval loads this module from the task's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image


def images(doc: dict[str, Any]) -> list[Image.Image]:
    """The images of a question."""
    with Image.open(Path(__file__).parent / doc["image"]) as image:
        return [image.convert("RGB")]
