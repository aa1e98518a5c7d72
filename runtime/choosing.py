"""The likeliest of given answers: what each costs in log-probability, from one prefill.

A choice's tokens are scored one by one, each by the logits after those before it, and the end of
the turn after the last: log P(choice) = sum log p(token) + log sum p(end token). Choices that begin
with the same tokens share these steps. What the settings of generation change (temperature,
penalties, forbidden tokens) counts for nothing here.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import BackendError, SpecError
from edgeprune.runtime.answer import Choice, Turn
from edgeprune.runtime.backend import NOT_FINITE
from edgeprune.runtime.sequence import Sequence
from edgeprune.runtime.text import Prompter

MOST = 256
"""Choices at most: each takes its steps."""

Scores = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Choices:
    """Answers to choose from, each with its tokens; SpecError where they cannot be told apart."""

    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    ends: tuple[int, ...]  # tokens that end an answer

    @classmethod
    def of(cls, texts: Collection[str], prompter: Prompter, ends: tuple[int, ...]) -> Choices:
        """Choices as a model would write them after a question."""
        check(texts)
        ids = tuple(tuple(prompter.answer(text)[0].tolist()) for text in texts)
        if len(set(ids)) < len(ids):
            raise SpecError("two choices are the same tokens of this model; give each another text")
        return cls(tuple(texts), ids, ends)

    @property
    def longest(self) -> int:
        """Tokens of the longest choice."""
        return max(map(len, self.ids))

    def scored(self, sequence: Sequence, logits: Any, turn: Turn) -> Choice:
        """The likeliest choice, where `logits` follow the question that a sequence has read. The
        sequence is left as it is; each branch of the choices is read by a copy of it."""
        scores = np.zeros(len(self.ids))
        self._score(scores, sequence, log_probabilities(logits), list(range(len(scores))), 0)
        probabilities = np.exp(scores - np.logaddexp.reduce(scores))
        best = int(scores.argmax())  # of equal ones the first
        return Choice(
            self.texts[best],
            dict(zip(self.texts, probabilities.tolist(), strict=True)),
            dict(zip(self.texts, scores.tolist(), strict=True)),
            self.ids[best],
            turn.timings,
            turn.prompt_tokens,
            sequence.warnings,
        )

    def _score(
        self, scores: Scores, sequence: Sequence, following: Scores, those: list[int], depth: int
    ) -> None:
        """Add to the scores of those choices whose first `depth` tokens a sequence has read what
        comes next; `following` is the log-probability of each next token."""
        branches: dict[int, list[int]] = {}
        for index in those:
            if len(self.ids[index]) == depth:
                scores[index] += np.logaddexp.reduce(following[list(self.ends)])
            else:
                branches.setdefault(self.ids[index][depth], []).append(index)
        for token, members in branches.items():
            scores[members] += following[token]
            branch = sequence.branch()
            try:
                output = branch.read(np.array([[token]], np.int64))
                self._score(scores, branch, log_probabilities(output.logits), members, depth + 1)
            finally:
                branch.close()


def check(texts: Collection[str]) -> None:
    """SpecError unless these are two or more texts, none twice."""
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise SpecError("choices are a list of texts")
    if not 2 <= len(texts) <= MOST:
        raise SpecError(f"choices are from 2 to {MOST} texts; got {len(texts)}")
    for text in texts:
        if text != text.strip() or not text:
            raise SpecError(f"a choice is a text without white space at its ends; got {text!r}")
    if len(set(texts)) < len(texts):
        raise SpecError("each choice stands once; one is there twice")


def log_probabilities(logits: Any) -> Scores:
    """Of each token to come next, from the logits of all: [vocabulary]."""
    scores = np.asarray(logits, np.float64)
    if not np.isfinite(scores).all():
        raise BackendError(NOT_FINITE)
    found: Scores = scores - np.logaddexp.reduce(scores)
    return found
