"""What is timed; needs numpy only, for peers' environments too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Array = NDArray[Any]

SHAPE = "0.5b"
VISUAL, TEXT = 576, 64
PREFIX = 5  # of the text tokens, those before the image
CLOSE = 1e-4  # largest difference of two logits, as a share of the largest logit
NEAR = 0.7  # of quantised graphs: root mean square, in standard deviations; unrelated are at 1.4

PEERS = {
    "genai": "shared",
    "mobius": "shared",
    "mobius-standard": "grown",
    "mobius-static": "static",
    "optimum": "grown",
    "genai-int4": "shared",
    "llama-q4_0": "own",
}
LLAMA = "llama-q4_0"
INT4 = "genai-int4", LLAMA
OURS = {"dense-int4": "int4", "dense-int4-32": "int4:block=32"}
"""Our bundles in 4 bits; peers' blocks have 32 inputs."""
"""Peers, and what their caches do: past and present in one buffer, copied every step, written at
an index into a buffer whose size is part of the graph."""

STATIC = 704  # slots of mobius-static's caches: 640 tokens and an answer


@dataclass(frozen=True)
class Job:
    """A prompt [1, N] and the tokens that follow it, the same for all graphs."""

    prompt: Ids
    following: Ids

    @property
    def tokens(self) -> int:
        return int(self.prompt.shape[1])
