"""The seam between a session and an inference engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import BackendError

Ids = NDArray[np.int64]

NOT_FINITE = (
    "the decoder returned logits that are not finite, so the answer ends here; try another picture"
    " or prompt, or export again with --dtype bf16 or --dtype fp32"
)


@dataclass(frozen=True)
class Chunk:
    """One call of the decoder: ids [1, P] and [1, T], where it starts, and what is cached."""

    prefix_ids: Ids
    text_ids: Ids
    position: int  # of the first token of this call
    lengths: Ids  # [layers], tokens already in each layer's cache
    with_picture: bool


class Output:
    """What a call gives: the kept positions at each pruning site, logits and likeliest token.

    Logits may stay on the device until they are asked for, which must be before the next call.
    """

    def __init__(
        self,
        logits: NDArray[Any] | Callable[[], NDArray[Any]],
        kept: tuple[Ids, ...],
        token: int | None = None,
    ) -> None:
        self.kept, self._logits, self._token = kept, logits, token

    @property
    def logits(self) -> NDArray[Any]:
        """Of the last token: [vocabulary]."""
        if callable(self._logits):
            self._logits = self._logits()
        return self._logits

    @property
    def token(self) -> int:
        """The likeliest next token, of equal ones the first; BackendError unless logits are finite.

        A graph's own `token` is -1 there. numpy takes what is not a number for the largest.
        """
        if self._token is None:
            token = int(self.logits.argmax())
            finite = bool(np.isfinite(self.logits[token]))
        else:
            token, finite = self._token, self._token >= 0
        if not finite:
            raise BackendError(NOT_FINITE)
        return token


class Backend(Protocol):
    """An engine with one picture and one set of KV caches; batch 1."""

    name: str
    text_capacity: int | None  # tokens of text that the caches hold; None: as many as it takes
    build_seconds: float | None  # that engines took to build; None where nothing is built

    def see(self, pixels: NDArray[np.float32]) -> Ids:
        """Run the vision graph, hold its visual tokens, return which were kept: int64 [r_1]."""
        ...

    def reserve(self, capacities: Sequence[int]) -> None:
        """Make each layer's cache hold at least so many tokens; what is cached stays."""
        ...

    def run(self, chunk: Chunk) -> Output:
        """Prefill, a later turn, or one decode step."""
        ...

    def cache_bytes(self) -> int:
        """Bytes that the KV caches take now."""
        ...

    def close(self) -> None:
        """Free the engine and its memory at once; the last call."""
        ...


class FakeBackend:
    """An engine that answers from a script of token ids, and remembers what it was asked."""

    name = "fake"
    text_capacity: int | None = None
    build_seconds: float | None = None

    def __init__(self, script: Sequence[int], vocabulary: int, visual_tokens: int) -> None:
        self.script, self.vocabulary, self.visual = list(script), vocabulary, visual_tokens
        self.chunks: list[Chunk] = []
        self.capacities: list[int] = []

    def see(self, pixels: NDArray[np.float32]) -> Ids:
        return np.arange(self.visual)

    def reserve(self, capacities: Sequence[int]) -> None:
        self.capacities = list(capacities)

    def run(self, chunk: Chunk) -> Output:
        logits = np.zeros(self.vocabulary, np.float32)
        logits[self.script[min(len(self.chunks), len(self.script) - 1)]] = 1
        self.chunks.append(chunk)
        return Output(logits, ())

    def cache_bytes(self) -> int:
        return 0

    def close(self) -> None:
        pass
