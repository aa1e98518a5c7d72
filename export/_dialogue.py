"""A sample played through an engine: a prefill, two decode steps and a second turn on one cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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

CALLS = ("prefill", "first decode step", "second decode step", "second turn")

REPORT = "Please report the model and the command"

Array = NDArray[Any]


@dataclass(frozen=True)
class Outcome:
    """What one engine makes of a sample."""

    kept: tuple[Tensor, ...]  # whose places the survivors took: in the encoder, then at each site
    visual: Tensor  # [1, r_1, width], between the graphs
    logits: tuple[Tensor, ...]  # float32 [vocabulary], of each of CALLS

    def keeps_as(self, other: Outcome) -> bool:
        """Whether every site's survivors take the same places."""
        return all(map(torch.equal, self.kept, other.kept))

    def survivors(self) -> list[set[int]]:
        """The places in the image that survive each site, the encoder first."""
        alive, *later = self.kept
        survivors = [alive]
        for kept in later:
            survivors.append(survivors[-1][kept])
        return [set(indices.tolist()) for indices in survivors]

    def not_finite(self) -> str:
        """Where the first infinity or NaN is; empty where every number is finite."""
        if not self.visual.isfinite().all():
            return "visual tokens"
        calls = zip(CALLS, self.logits, strict=True)
        return next((f"logits of the {c}" for c, values in calls if not _finite(values)), "")


def _finite(values: Tensor) -> bool:
    return bool(values.isfinite().all())


class Graphs:
    """The two graphs in ONNX Runtime, fed plainly: no bound buffers, every present a new array."""

    def __init__(
        self,
        folder: Path,
        decoder: Decoder,
        dtype: torch.dtype = torch.float32,
        room: int = 128,
    ) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4  # without bound buffers the cache is copied: meant here
        providers = ["CPUExecutionProvider"]
        with _told("cannot load"):
            self.vision = ort.InferenceSession(folder / "vision.onnx", options, providers)
            self.decoder = ort.InferenceSession(folder / "decoder.onnx", options, providers)
        self.plan, self.config, self.room = decoder.plan, decoder.config, room
        self.span, self.dtype = decoder.span, dtype
        self.kept = self.plan.kept_outputs
        ends = {end.name: end.shape for end in self.decoder.get_inputs()}
        self.shapes = {n[5:]: shape for n, shape in ends.items() if n.startswith("past_")}

    def prefill(self, prompt: Prompt) -> Step:
        """An image and a first question; `visual` and `vision_kept` are the vision graph's."""
        self.caches: dict[str, Array] = {}
        for name, shape in self.shapes.items():
            layer = name.partition(".")[2]
            room = {f"capacity.{layer}": self.plan.counts[int(layer)] + self.room}
            sizes = [d if isinstance(d, int) else room.get(d, 0) for d in shape]  # 0: it grows
            self.caches[name] = torch.zeros(sizes, dtype=self.dtype).numpy()
        self.lengths, self.position = np.zeros(self.config.layers, np.int64), 0
        with _told("cannot run"):
            visual, kept = self.vision.run(None, {"pixels": prompt.pixels.to(self.dtype).numpy()})
        self.visual, self.vision_kept = torch.from_numpy(visual), torch.from_numpy(kept)
        return self._run(prompt.prefix_ids.numpy(), visual, prompt.text_ids.numpy(), kept)

    def step(self, ids: Tensor) -> Step:
        """More text, int64 [1, T]: one token to decode, or the next turn's."""
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
        with _told("cannot run"):
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


@contextmanager
def _told(what: str) -> Iterator[None]:
    """ParityError in a line where ONNX Runtime fails at a graph."""
    try:
        yield
    except Exception as error:  # onnxruntime raises a kind per status code
        raise ParityError(
            f"ONNX Runtime {what} an exported graph ({error}); nothing was written. {REPORT}"
        ) from error


def play(
    engine: Reference | Graphs, prompt: Prompt, token: Tensor | None = None
) -> tuple[Outcome, Tensor]:
    """What an engine makes of a sample, and the token that its first decode step was given.

    Without a `token` int64 [1, 1] that is the likeliest one.
    """
    first = engine.prefill(prompt)
    visual, kept = engine.visual, engine.vision_kept
    token = first.logits.argmax()[None, None] if token is None else token
    later = [engine.step(ids) for ids in (token, prompt.text_ids[:, -1:], prompt.text_ids)]
    logits = tuple(step.logits for step in (first, *later))
    return Outcome((kept, *first.kept), visual, logits), token
