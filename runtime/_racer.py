"""One bundle of a `bench`, in a process of its own: the laps that its parent asks for.

In one process the ONNX Runtime session opened first decodes about a tenth slower than those after
it, and all share one heap; apart, no bundle profits from its place in the list. Parent and child
speak in lines of JSON: the request, then `lap` per lap; each is answered by one line.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune import memory
from edgeprune.bundle import Bundle
from edgeprune.errors import CapacityError, EdgepruneError
from edgeprune.runtime import backends
from edgeprune.runtime.backend import Chunk

PREFIX = 5
"""Text tokens before the picture; LLaVA-1.5 without a system text has about as many."""


class Racer:
    """One bundle on its engine, with inputs made of noise."""

    def __init__(
        self, path: Path, backend: str, text_tokens: int, new_tokens: int, threads: int | None
    ) -> None:
        started = time.perf_counter()
        bundle = Bundle.open(path, verify=False)
        self.manifest = bundle.manifest
        self.backend = backends.make(bundle, backend, threads)
        self.load_seconds = time.perf_counter() - started
        self.text_tokens, self.new_tokens = text_tokens, new_tokens
        image, rng = self.manifest.image, np.random.default_rng(0)
        self.pixels = rng.standard_normal(image.shape, np.float32)
        ids = rng.integers(3, self.manifest.decoder.vocabulary, (1, text_tokens))
        self.prefix_ids, self.text_ids = ids[:, :PREFIX], ids[:, PREFIX:]
        self.counts = np.array(self.manifest.prune.counts)
        needed = self.manifest.span + text_tokens + new_tokens
        if needed > self.manifest.decoder.max_positions:
            raise CapacityError(
                f"{path} has {self.manifest.decoder.max_positions} positions, this bench needs"
                f" {needed}; lower --text-tokens or --new-tokens"
            )

    def lap(self) -> tuple[float, float, float]:
        """Seconds of vision, of prefill, and of one decode step."""
        clock = time.perf_counter
        begin = clock()
        self.backend.see(self.pixels)
        seen = clock()
        lengths, position = np.zeros(len(self.counts), np.int64), 0
        after = lengths + self.text_tokens + self.counts
        self._run(Chunk(self.prefix_ids, self.text_ids, position, lengths, True), after)
        filled = clock()
        lengths, position = after, self.text_tokens + self.manifest.span
        empty, token = np.zeros((1, 0), np.int64), self.text_ids[:, :1]
        for step in range(self.new_tokens):
            self._run(Chunk(empty, token, position + step, lengths, False), lengths + 1)
            lengths = lengths + 1
        return seen - begin, filled - seen, (clock() - filled) / self.new_tokens

    def _run(self, chunk: Chunk, after: np.ndarray) -> None:
        self.backend.reserve(after.tolist())
        self.backend.run(chunk)


def main() -> None:
    """Serve laps until the parent closes the pipe."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # nothing else may speak on the pipe
    request = json.loads(sys.stdin.readline())
    try:
        racer = Racer(Path(request.pop("path")), **request)
        _say(answers, {"load_seconds": racer.load_seconds})
        for _ in sys.stdin:
            _say(answers, {"lap": racer.lap(), "peak_bytes": memory.peak_bytes()})
    except EdgepruneError as error:
        _say(answers, {"error": type(error).__name__, "message": str(error)})


def _say(stream: Any, what: dict[str, Any]) -> None:
    print(json.dumps(what), file=stream, flush=True)


if __name__ == "__main__":
    main()
