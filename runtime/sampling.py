"""Logits -> the next token, and the end of an answer in its text.

The order of the filters, and what each keeps, is that of transformers: temperature, top-k, top-p.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgeprune.errors import BackendError, SpecError
from edgeprune.runtime.backend import NOT_FINITE


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn; the default is greedy."""

    temperature: float = 0.0  # 0 takes the likeliest token; the other filters then do nothing
    top_k: int = 0  # only the k likeliest tokens; 0: all
    top_p: float = 1.0  # only the likeliest tokens that together reach this probability
    seed: int = 0
    stop: tuple[str, ...] = ()  # an answer ends before the first of these strings
    max_new_tokens: int | None = None  # None: the bundle's own number, fewer where fewer fit

    def __post_init__(self) -> None:
        _require(
            math.isfinite(self.temperature) and self.temperature >= 0,
            f"the temperature is 0 (greedy) or a positive number; got {self.temperature}",
        )
        _require(self.top_k >= 0, f"top-k is a number of tokens, 0 for all; got {self.top_k}")
        _require(0 < self.top_p <= 1, f"top-p is above 0 and at most 1; got {self.top_p}")
        _require(self.seed >= 0, f"the seed is a whole number from 0; got {self.seed}")
        _require(
            isinstance(self.stop, tuple) and all(self.stop),
            f"stop strings come in a tuple and none is empty; got {self.stop!r}",
        )
        _require(
            self.max_new_tokens is None or self.max_new_tokens >= 1,
            f"an answer has at least 1 token; got {self.max_new_tokens}",
        )

    def rng(self) -> np.random.Generator:
        """A fresh source of chance; equal seeds give equal answers."""
        return np.random.default_rng(self.seed)

    def pick(self, logits: ArrayLike, rng: np.random.Generator) -> int:
        """The next token, from the logits of all: [vocabulary]."""
        if self.temperature == 0:
            return int(_checked(logits).argmax())  # of equal ones the first
        probabilities = self.distribution(logits)
        return int(rng.choice(probabilities.size, p=probabilities))

    def distribution(self, logits: ArrayLike) -> NDArray[np.float64]:
        """What `pick` draws from: [vocabulary] -> probabilities [vocabulary]."""
        scores = _checked(logits)
        if self.temperature == 0:
            return _normalised((np.arange(scores.size) == scores.argmax()).astype(np.float64))
        scores = (scores - scores.max()) / self.temperature
        if 0 < self.top_k < scores.size:
            least = np.partition(scores, -self.top_k)[-self.top_k]
            scores = np.where(scores < least, -np.inf, scores)  # what equals the k-th stays too
        probabilities = _normalised(np.exp(scores))
        if self.top_p < 1:
            order = probabilities.argsort(kind="stable")
            dropped = order[probabilities[order].cumsum() <= 1 - self.top_p]
            probabilities[dropped[dropped != order[-1]]] = 0
        return _normalised(probabilities)


class StopWatcher:
    """Cuts a growing text before the first stop string that it completes.

    Text that may be the start of a stop string is held back until that is known; joined, what
    `feed` and `finish` return does not depend on how the text was divided into pieces.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held = ""
        self.stopped = False

    def feed(self, piece: str) -> str:
        """The text that may be shown now; nothing more once `stopped`."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]
        shown = len(text) - self._undecided(text)
        self._held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = min(len(text), max(map(len, self._stop), default=0))
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0


def _checked(logits: ArrayLike) -> NDArray[np.float64]:
    scores = np.asarray(logits, np.float64)
    if not np.isfinite(scores.max()):  # also where any is not a number
        raise BackendError(NOT_FINITE)
    return scores


def _normalised(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    probabilities: NDArray[np.float64] = weights / weights.sum()
    return probabilities


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise SpecError(message)
