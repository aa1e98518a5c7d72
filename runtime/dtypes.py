"""Numbers as an engine stores them: float32, float16, or bfloat16, which numpy does not know."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.lowering import DTYPES


def stored_type(dtype: str) -> np.dtype[Any]:
    """numpy's type of the elements, or of their bits where numpy does not know them."""
    return np.dtype(DTYPES[dtype].stored)


def to_stored(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Float32 numbers rounded to `dtype` (to the nearest, ties to even) and laid out as stored."""
    if dtype != "bf16":
        return np.ascontiguousarray(values, stored_type(dtype))
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_stored(stored: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """What an engine stored, as float32 numbers."""
    if dtype != "bf16":
        return stored.astype(np.float32)
    wide: NDArray[np.float32] = (stored.astype(np.uint32) << 16).view(np.float32)
    return wide
