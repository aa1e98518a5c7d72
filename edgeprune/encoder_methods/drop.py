"""Drop: unchosen patches leave before one block for good, and so do their visual tokens.

The units that are chosen (edgeprune/encoder_methods/_choices.py) go through all blocks, alone, and
they alone reach the projector. So fewer than V visual tokens leave the encoder, and what a method
of the decoder prunes it chooses among these. CR goes on counting all V: half of the patches dropped
and nothing pruned behind the encoder is CR 2, and --cr 4 is a quarter of V in the mean layer.

Policies that look at the encoder's attention see that of the last block, among the patches that
are left. Tokens keep their positions, unless the decoder's method renumbers those that it keeps
before the decoder itself; --set positions= says otherwise. Where a visual token is made of patches
all over a tile, or tiles have different numbers of tokens since padding is left out, no patch may
go for good: `exit` serves.

Each tile, image or span of frames keeps as many. Choosing objects by what blocks at a third of the
depth attend to is HiPrune's idea (arXiv 2508.00553), which prunes behind the encoder; leaving
before a block, by features or pixels, that of PixelPrune (arXiv 2604.00886).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edgeprune.encoder_methods import _method


@dataclass(frozen=True)
class Method(_method.EncoderMethod):
    summary: ClassVar[str] = "unchosen patches leave the encoder for good, as do their tokens"
    rejoins: ClassVar[bool] = False

    limit: float = 0.19  # where tokens are renumbered, part of the angle loses no answers
