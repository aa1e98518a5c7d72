"""One bundle of a `bench` on one backend, in a process of its own: the rounds its parent asks for.

In one process the ONNX Runtime session opened first decodes about a tenth slower than those after
it, and all share one heap; apart, no bundle profits from its place in the list. Parent and child
speak in lines of JSON: the request, then `round` or `answer` each; all are answered by one line.
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
from edgeprune.errors import CapacityError, EdgepruneError
from edgeprune.runtime import backends
from edgeprune.runtime.backend import EncodedImage, Output
from edgeprune.runtime.engine import Engine

PREFIX = 5
"""Text tokens before the image; LLaVA-1.5 without a system text has about as many."""


class BenchWorker:
    """One bundle on its engine, with inputs made of noise."""

    def __init__(
        self,
        path: Path,
        backend: str,
        text_tokens: int,
        new_tokens: int,
        threads: int | None,
        cr: float | None = None,
    ) -> None:
        self.gpu = backends.find(backend).gpu
        meter = power.find(self.gpu)
        self.sampler = power.Sampler(meter) if meter else None
        started = time.perf_counter()
        with self.sampler or nullcontext():
            self.engine = Engine.open(
                path, backend, threads=threads, verify=False, tile_memory_mb=0
            )
        self.manifest, self.sequence = self.engine.manifest.at(cr), self.engine.sequence()
        self.cr = cr
        self.load_seconds = time.perf_counter() - started
        self.text_tokens, self.new_tokens = text_tokens, new_tokens
        image, rng = self.manifest.image, np.random.default_rng(0)
        self.pixels = rng.standard_normal(image.shape, np.float32)
        ids = rng.integers(3, self.manifest.decoder.vocabulary, (1, text_tokens))
        self.prefix_ids, self.text_ids = ids[:, :PREFIX], ids[:, PREFIX:]
        needed = self.manifest.decoder.image_positions + text_tokens + new_tokens
        if needed > self.manifest.decoder.max_positions:
            raise CapacityError(
                f"{path} has {self.manifest.decoder.max_positions} positions, this bench needs"
                f" {needed}; lower --text-tokens or --new-tokens"
            )

    def time_round(self) -> dict[str, Any]:
        """Seconds of vision, of prefill, and of one decode step; watts where there is a meter."""
        with self.sampler or nullcontext():
            seconds = self._seconds()
        watts = self.sampler.watts() if self.sampler else None
        return {"seconds": seconds, "watts": watts, "peak_bytes": self._peak_bytes()}

    def answer(self) -> Answer:
        """What it says greedily on the noise, the same noise for all."""
        output = self._prefill(self.engine.encode_pixels(self.pixels, cr=self.cr), logits=True)
        assert output.logits is not None  # they were asked for
        logits, tokens = output.logits.astype(np.float32), [output.token]
        for _ in range(self.new_tokens - 1):
            tokens.append(self.sequence.read(np.array([tokens[-1:]]), logits=False).token)
        sites = self.sequence.vision_kept, *self.sequence.layer_kept
        return Answer(tokens, [kept.tolist() for kept in sites], pack(logits))

    def _seconds(self) -> tuple[float, float, float]:
        clock = time.perf_counter
        begin = clock()
        image = self.engine.encode_pixels(self.pixels, cr=self.cr)
        seen = clock()
        self._prefill(image, logits=False)
        filled = clock()
        token = self.text_ids[:, :1]
        for _ in range(self.new_tokens):
            self.sequence.read(token, logits=False)
        return seen - begin, filled - seen, (clock() - filled) / self.new_tokens

    def _prefill(self, image: EncodedImage, *, logits: bool) -> Output:
        self.sequence.reset()
        return self.sequence.read(self.text_ids, self.prefix_ids, image, logits=logits)

    def _peak_bytes(self) -> int | None:
        """What the process holds; on a GPU, what that holds more than before the bundle."""
        if not self.gpu:
            return memory.peak_bytes()
        return self.sampler.most_bytes if self.sampler else None


def main() -> None:
    """Serve rounds until the parent closes the pipe."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # nothing else may speak on the pipe
    request = json.loads(sys.stdin.readline())
    try:
        worker = BenchWorker(Path(request.pop("path")), **request)
        built = worker.engine.backend.build_seconds
        meter = worker.sampler.meter.source if worker.sampler else ""
        _say(
            answers,
            {"load_seconds": worker.load_seconds, "build_seconds": built, "meter": meter},
        )
        for line in sys.stdin:
            timed = line.strip() == "round"
            _say(answers, worker.time_round() if timed else asdict(worker.answer()))
    except EdgepruneError as error:
        _say(answers, {"error": type(error).__name__, "message": str(error)})


def _say(stream: Any, what: dict[str, Any]) -> None:
    print(json.dumps(what), file=stream, flush=True)


if __name__ == "__main__":
    main()
