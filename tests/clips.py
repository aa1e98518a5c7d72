"""Small videos, made by PyAV."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

TURNS = {
    "none": (1, 0, 0, 1),
    "90 clockwise": (0, 1, -1, 0),
    "180": (-1, 0, 0, -1),
    "90 counter-clockwise": (0, -1, 1, 0),
    "mirrored": (-1, 0, 0, 1),
    "mirrored, 90 clockwise": (0, 1, 1, 0),
    "a matrix of zeros": (0, 0, 0, 0),
}
"""a, b, c, d of an MP4's display matrix, in which x' = a x + c y and y' = b x + d y."""


def clip(path: Path, frames: int) -> Path:
    """A video of 32 x 16 pixels without loss, ten frames a second, frame n of grey level 20 n."""
    levels = [np.full((16, 32), 20 * number, np.uint8) for number in range(frames)]
    return encoded(path, "ffv1", "gray", levels)


def corner(path: Path, turn: str = "none", aspect: Fraction = Fraction(1)) -> Path:
    """An MP4 of 64 x 32 pixels, black but for its upper left quarter, with a display matrix."""
    levels = np.zeros((32, 64), np.uint8)
    levels[:16, :32] = 255
    encoded(path, "mpeg4", "yuv420p", [levels] * 4, aspect)
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 4 + 20 + 16  # of a header of version 0
    a, b, c, d = (value << 16 for value in TURNS[turn])
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


def encoded(
    path: Path, codec: str, pixels: str, frames: list[np.ndarray], aspect: Fraction = Fraction(1)
) -> Path:
    """Grey frames [height, width] at ten a second; the container goes by the file's name."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width = frames[0].shape
        stream.pix_fmt, stream.codec_context.sample_aspect_ratio = pixels, aspect
        for levels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(levels, format="gray")))
        container.mux(stream.encode())
    return path
