"""Early exit: unchosen patches stop before one block, pass a fitted linear map, and come back.

The units that are chosen (edgeprune/encoder_methods/_choices.py) go through all blocks, alone. The
others take one product with a matrix, W x W and a bias for each hidden state that is read, and
stand in their places again before the projector. The decoder sees all V visual tokens, so every
method, ratio, schedule and position stays what it is.

The matrix is a ridge regression from the state before the block to what the dense encoder would
have said of the same patches, in closed form, on calibration images (edgeprune/calib/exit_map.py).
Only the encoder runs for it, and nothing is trained by gradients.

Policies that look at the encoder's attention see that of the last block before the exit, the last
in which every patch takes part. The encoder becomes cheaper, which CR does not count: the manifest
tells the encoder's operations beside it.

This project's own method; no paper is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edgeprune.encoder_methods import _method


@dataclass(frozen=True)
class Method(_method.EncoderMethod):
    summary: ClassVar[str] = "unchosen patches leave the encoder early, through a fitted map"
    rejoins: ClassVar[bool] = True
