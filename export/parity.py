"""Parity: an exported pair of graphs against the eager reference of the same policy.

Each sample is prefilled, decoded for two tokens and asked again on the same cache. Kept sets must
be the same and logits within a tolerance; a sample whose kept sets differ by a tie (scores equal
to 1e-5 of the largest) is counted, not compared further.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeprune.errors import ParityError
from edgeprune.models._decoder import Decoder
from edgeprune.models._processor import Prompt
from edgeprune.models._reference import Reference, Step
from edgeprune.policies._signals import LayerSignals

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference of two logits, as a share of the largest logit where that is above 1."""

Array = NDArray[Any]


@dataclass(frozen=True)
class Parity:
    """Over all samples: how many, how many differed by a tie, the largest logit difference."""

    samples: int
    ties: int
    logits: float
    tolerance: float


class Watching(Decoder):
    """The eager decoder, remembering the scores that each site cut."""

    def begin(self) -> None:
        self.scores: dict[int, Tensor] = {}

    def observe(self, layer: int, signals: LayerSignals) -> None:
        if str(layer + 1) in self.prune:
            self.scores[layer + 1] = self.policy.record(layer, signals)


class Graphs:
    """The two graphs in ONNX Runtime, fed plainly: no bound buffers, every present a new array."""

    def __init__(self, folder: Path, decoder: Decoder, room: int = 64) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4  # without bound buffers the cache is copied: meant here
        providers = ["CPUExecutionProvider"]
        self.vision = ort.InferenceSession(folder / "vision.onnx", options, providers)
        self.decoder = ort.InferenceSession(folder / "decoder.onnx", options, providers)
        self.plan, self.config, self.room = decoder.plan, decoder.config, room
        self.span = decoder.span
        self.dtype = decoder.embedding.weight.dtype
        self.kept = self.plan.kept_outputs

    def prefill(self, prompt: Prompt) -> tuple[Step, Tensor]:
        """Logits and kept positions, and what the vision graph kept."""
        config = self.config
        self.caches: dict[str, Array] = {}
        for layer, count in enumerate(self.plan.counts):
            shape = (1, config.kv_heads, count + self.room + 64, config.head_size)
            for kind in ("key", "value"):
                self.caches[f"{kind}.{layer}"] = torch.zeros(shape, dtype=self.dtype).numpy()
        self.lengths, self.position = np.zeros(config.layers, np.int64), 0
        visual, kept = self.vision.run(None, {"pixels": prompt.pixels.to(self.dtype).numpy()})
        step = self._run(prompt.prefix_ids.numpy(), visual, prompt.text_ids.numpy(), kept)
        return step, torch.from_numpy(kept)

    def step(self, ids: Tensor) -> Step:
        empty = torch.zeros(1, 0, self.config.width, dtype=self.dtype).numpy()
        nothing = np.zeros((1, 0), np.int64)
        return self._run(nothing, empty, ids.numpy(), nothing[0])

    def _run(self, prefix_ids: Array, visual: Array, text_ids: Array, places: Array) -> Step:
        feeds = {
            "prefix_ids": prefix_ids,
            "visual": visual,
            "text_ids": text_ids,
            "position": np.array([self.position]),
            "lengths": self.lengths,
            **{f"past_{name}": cache for name, cache in self.caches.items()},
        }
        if self.config.mrope is not None:
            feeds["places"] = places
        names = ["logits", *self.kept, *(f"present_{name}" for name in self.caches)]
        logits, *rest = self.decoder.run(names, feeds)
        kept, present = rest[: len(self.kept)], rest[len(self.kept) :]
        self.caches = dict(zip(self.caches, present, strict=True))
        counts = np.minimum(self.plan.counts, visual.shape[1])
        text = prefix_ids.shape[1] + text_ids.shape[1]
        self.lengths = self.lengths + text + counts
        self.position += text + (self.span if visual.shape[1] else 0)
        return Step(
            torch.from_numpy(logits[0, 0].astype(np.float32)),
            tuple(torch.from_numpy(k) for k in kept),
        )


def check(
    folder: Path,
    reference: Reference,
    prompts: Iterable[Prompt],
    progress: Callable[[int], None] = lambda done: None,
) -> Parity:
    """Compare a draft bundle with its reference; ParityError where they disagree."""
    graphs, dtype = Graphs(folder, reference.decoder), reference.decoder.embedding.weight.dtype
    tolerance, worst, ties, done = TOLERANCE[dtype], 0.0, 0, 0
    for prompt in prompts:
        difference = _compare(graphs, reference, prompt)
        ties += difference is None
        worst = max(worst, difference or 0.0)
        done += 1
        progress(done)
    if dtype == torch.float32 and ties == done > 0:
        raise ParityError(
            f"the exported graph keeps other tokens than the eager reference on all {done} samples;"
            " nothing was written. Please report the model and the command"
        )
    if worst > tolerance:
        raise ParityError(
            f"the exported graph's logits differ from the eager reference by {worst:.2e}, at most"
            f" {tolerance:g} is right; nothing was written. Please report the model and the command"
        )
    return Parity(done, ties, worst, tolerance)


def _compare(graphs: Graphs, reference: Reference, prompt: Prompt) -> float | None:
    """Largest relative logit difference over a prefill, two decode steps and a second turn."""
    decoder = reference.decoder
    if isinstance(decoder, Watching):
        decoder.begin()
    wanted = reference.prefill(prompt)
    found, vision_kept = graphs.prefill(prompt)
    if not torch.equal(reference.vision_kept, vision_kept) or not _same(decoder, wanted, found):
        return None
    worst = _difference(wanted, found)
    for ids in (wanted.logits.argmax()[None, None], prompt.text_ids[:, -1:], prompt.text_ids):
        worst = max(worst, _difference(reference.step(ids), graphs.step(ids)))
    return worst


def _same(decoder: Decoder, wanted: Step, found: Step) -> bool:
    """Whether kept sets agree; where they do not, ParityError unless scores at the cut tie."""
    stages = [s for s in decoder.plan.stages if s.in_decoder]
    for stage, ours, theirs in zip(stages, wanted.kept, found.kept, strict=True):
        if torch.equal(ours, theirs):
            continue
        if stage.layer == 1:
            return False  # a greedy choice has no scores; `check` refuses where none agrees
        if not isinstance(decoder, Watching):
            raise ParityError(f"layer {stage.layer} keeps other tokens than the eager reference")
        scores = decoder.scores[stage.layer]
        swapped = sorted(set(ours.tolist()) ^ set(theirs.tolist()))
        spread = float(scores[swapped].max() - scores[swapped].min())
        if spread > 1e-5 * float(scores.max()):
            raise ParityError(
                f"layer {stage.layer} keeps other tokens than the eager reference: {swapped}"
            )
        return False
    return True


def _difference(wanted: Step, found: Step) -> float:
    scale = max(1.0, float(wanted.logits.abs().max()))
    return float((wanted.logits - found.logits).abs().max()) / scale
