"""One bundle of a `bench` on one backend, in a process of its own: the laps its parent asks for.

In one process the ONNX Runtime session opened first decodes about a tenth slower than those after
it, and all share one heap; apart, no bundle profits from its place in the list. Parent and child
speak in lines of JSON: the request, then `lap` or `answer` each; all are answered by one line.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune import memory
from edgeprune.bench import power
from edgeprune.bench.agreement import Answer, pack
from edgeprune.bundle import Bundle
from edgeprune.errors import CapacityError, EdgepruneError
from edgeprune.runtime import backends
from edgeprune.runtime.backend import Chunk, Ids, Output

PREFIX = 5
"""Text tokens before the picture; LLaVA-1.5 without a system text has about as many."""


class BenchWorker:
    """One bundle on its engine, with inputs made of noise."""

    def __init__(
        self, path: Path, backend: str, text_tokens: int, new_tokens: int, threads: int | None
    ) -> None:
        meter = power.find(backend != "ort-cpu")
        self.sampler = power.Sampler(meter) if meter else None
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

    def lap(self) -> dict[str, Any]:
        """Seconds of vision, of prefill, and of one decode step; watts where there is a meter."""
        with self.sampler or nullcontext():
            seconds = self._lap()
        watts = self.sampler.watts() if self.sampler else None
        return {"seconds": seconds, "watts": watts, "peak_bytes": self._peak_bytes()}

    def answer(self) -> Answer:
        """What it says greedily on the noise, the same noise for all."""
        vision_kept = self.backend.see(self.pixels)
        lengths, output = self._prefill()
        logits, layer_kept, tokens = output.logits.astype(np.float32), output.kept, [output.token]
        for step in range(self.new_tokens - 1):
            token = np.array([tokens[-1:]])
            tokens.append(self._decode(token, step, lengths + step).token)
        kept = [places.tolist() for places in (vision_kept, *layer_kept)]
        return Answer(tokens, kept, pack(logits))

    def _lap(self) -> tuple[float, float, float]:
        clock = time.perf_counter
        begin = clock()
        self.backend.see(self.pixels)
        seen = clock()
        lengths, _ = self._prefill()
        filled = clock()
        token = self.text_ids[:, :1]
        for step in range(self.new_tokens):
            self._decode(token, step, lengths + step)
        return seen - begin, filled - seen, (clock() - filled) / self.new_tokens

    def _prefill(self) -> tuple[Ids, Output]:
        """What then is in each layer's cache, and the output."""
        lengths = np.zeros(len(self.counts), np.int64)
        after: Ids = lengths + self.text_tokens + self.counts
        return after, self._run(Chunk(self.prefix_ids, self.text_ids, 0, lengths, True), after)

    def _decode(self, token: Ids, step: int, lengths: Ids) -> Output:
        empty, position = np.zeros((1, 0), np.int64), self.text_tokens + self.manifest.span + step
        return self._run(Chunk(empty, token, position, lengths, False), lengths + 1)

    def _run(self, chunk: Chunk, after: Ids) -> Output:
        self.backend.reserve(after.tolist())
        return self.backend.run(chunk)

    def _peak_bytes(self) -> int | None:
        """What the process holds; on a GPU, what that holds more than before the bundle."""
        if self.backend.name == "ort-cpu":
            return memory.peak_bytes()
        return self.sampler.most_bytes if self.sampler else None


def main() -> None:
    """Serve laps until the parent closes the pipe."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # nothing else may speak on the pipe
    request = json.loads(sys.stdin.readline())
    try:
        worker = BenchWorker(Path(request.pop("path")), **request)
        built = worker.backend.build_seconds
        meter = worker.sampler.meter.source if worker.sampler else ""
        _say(
            answers,
            {"load_seconds": worker.load_seconds, "build_seconds": built, "meter": meter},
        )
        for line in sys.stdin:
            lap = line.strip() == "lap"
            _say(answers, worker.lap() if lap else asdict(worker.answer()))
    except EdgepruneError as error:
        _say(answers, {"error": type(error).__name__, "message": str(error)})


def _say(stream: Any, what: dict[str, Any]) -> None:
    print(json.dumps(what), file=stream, flush=True)


if __name__ == "__main__":
    main()
