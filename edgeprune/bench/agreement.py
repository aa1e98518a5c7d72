"""Whether a bundle says the same on two backends: kept tokens, logits, greedy answer."""

from __future__ import annotations

import base64
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeprune.records import Amount, Magnitude


@dataclass(frozen=True)
class Answer:
    """What a bundle answers on one backend, in types that JSON has."""

    tokens: list[int]
    kept: list[list[int]]  # indices of survivors: of the vision graph, then of each pruning site
    logits: str  # of the prefill, packed


@dataclass(frozen=True)
class Agreement:
    """A backend's answer beside that of another one."""

    bundle: str
    backend: str
    against: str
    tokens: Amount  # asked
    same_tokens: Amount  # up to the first that differs
    kept: Amount  # indices, all sites together
    same_kept: Amount
    logits: Magnitude  # largest difference
    largest: Magnitude  # of the other's logits, without sign

    def line(self) -> str:
        """For people."""
        return (
            f"{self.bundle} on {self.backend} against {self.against}:"
            f" {self.same_tokens} of {self.tokens} greedy tokens,"
            f" {self.same_kept} of {self.kept} kept tokens,"
            f" logits within {self.logits:.1e} of {self.largest:.1e}"
        )


def compare(bundle: str, backend: str, mine: Answer, against: str, theirs: Answer) -> Agreement:
    """One backend's answer beside another's."""
    ours, wanted = unpack(mine.logits), unpack(theirs.logits)
    differ = [a != b for a, b in zip(mine.tokens, theirs.tokens, strict=True)]
    shared = (len(set(a) & set(b)) for a, b in zip(mine.kept, theirs.kept, strict=True))
    return Agreement(
        bundle=bundle,
        backend=backend,
        against=against,
        tokens=len(differ),
        same_tokens=differ.index(True) if True in differ else len(differ),
        kept=sum(map(len, theirs.kept)),
        same_kept=sum(shared),
        logits=float(np.abs(ours - wanted).max()),
        largest=float(np.abs(wanted).max()),
    )


def pack(logits: NDArray[np.float32]) -> str:
    """Numbers as text, none rounded."""
    return base64.b64encode(logits.astype("<f4").tobytes()).decode()


def unpack(text: str) -> NDArray[np.float32]:
    return np.frombuffer(base64.b64decode(text), "<f4")
