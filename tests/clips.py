"""Small videos without loss, made by PyAV."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


def clip(path: Path, frames: int) -> Path:
    """A video of 32 x 16 pixels, ten frames a second, frame n of grey level 20 n."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "gray"
        for number in range(frames):
            levels = np.full((16, 32), 20 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(levels, format="gray")))
        container.mux(stream.encode())
    return path
