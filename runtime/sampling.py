"""Logits -> the next token, and the end of an answer in its text.

The filters of a drawn answer, and their order, are those of transformers: temperature, top-k,
top-p, min-p. What is forbidden or made less likely before them is in `logits`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgeprune.errors import BackendError, SpecError
from edgeprune.generation import Sampling
from edgeprune.runtime.backend import NOT_FINITE
from edgeprune.runtime.formats import Grammar
from edgeprune.runtime.logits import Context, Ids, active

__all__ = ["Sampler", "Sampling", "StopWatcher", "distribution"]


class Sampler:
    """Chooses the tokens of one answer; equal settings and seeds give equal answers."""

    def __init__(
        self,
        sampling: Sampling,
        ends: Sequence[int],
        prompt: int,
        grammar: Grammar | None = None,
    ) -> None:
        """`ends` are the tokens that end an answer, `prompt` is how many tokens stand before it,
        those of images included; `grammar` is the form that the answer has."""
        self._sampling, self._ends, self._prompt = sampling, ends, prompt
        self._grammar = grammar
        self._processors = active(sampling)
        self._rng = np.random.default_rng(sampling.seed)

    @property
    def takes_likeliest(self) -> bool:
        """Whether each token is the likeliest, so that the graph's own choice will do."""
        greedy = self._sampling.temperature == 0
        return greedy and not self._processors and self._grammar is None

    def pick(self, logits: ArrayLike, ids: Ids) -> int:
        """The next token from the logits of all, [vocabulary], after the dialogue `ids`, [n]."""
        scores = _checked(logits)
        if self._processors or self._grammar:
            scores = self._processed(scores, ids)
        token = self._drawn(scores)
        if self._grammar:
            self._grammar.take(token)
        return token

    def _drawn(self, scores: NDArray[np.float32]) -> int:
        if self._sampling.temperature == 0:
            return int(scores.argmax())  # of equal ones the first
        probabilities = distribution(scores, self._sampling)
        return int(self._rng.choice(probabilities.size, p=probabilities))

    def _processed(self, logits: NDArray[np.float32], ids: Ids) -> NDArray[np.float32]:
        scores = logits.copy()
        context = Context(ids, ids.size - self._prompt, self._ends)
        with np.errstate(over="ignore"):  # a huge penalty
            for processor, setting in self._processors:
                processor(scores, setting, context)
        if self._grammar:
            self._grammar.mask(scores)
        if not np.isfinite(scores.max()):
            raise SpecError(
                "the settings of generation leave no token to choose; allow more with fewer"
                " suppressed tokens, or a larger --no-repeat-ngram-size"
            )
        return scores


def distribution(logits: ArrayLike, sampling: Sampling) -> NDArray[np.float64]:
    """What a drawn token is drawn from: [vocabulary] -> probabilities [vocabulary]."""
    scores = np.asarray(logits, np.float64)
    scores = (scores - scores.max()) / sampling.temperature
    if 0 < sampling.top_k < scores.size:
        least = np.partition(scores, -sampling.top_k)[-sampling.top_k]
        scores = np.where(scores < least, -np.inf, scores)  # what equals the k-th stays too
    probabilities = _normalised(np.exp(scores))
    if sampling.top_p < 1:
        order = probabilities.argsort(kind="stable")
        dropped = order[probabilities[order].cumsum() <= 1 - sampling.top_p]
        probabilities[dropped[dropped != order[-1]]] = 0
    probabilities[probabilities < sampling.min_p * probabilities.max()] = 0
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


def _checked(logits: ArrayLike) -> NDArray[np.float32]:
    scores = np.asarray(logits, np.float32)
    if not np.isfinite(scores).all():
        raise BackendError(NOT_FINITE)
    return scores


def _normalised(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    probabilities: NDArray[np.float64] = weights / weights.sum()
    return probabilities
