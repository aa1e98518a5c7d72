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

from edgeprune.errors import ParityError, brief
from edgeprune.export.unrounded import without_rounding
from edgeprune.graphs import DECODER, VISION, GraphRecord
from edgeprune.models._decoder import Decoder
from edgeprune.models._processor import Prompt
from edgeprune.models._reference import Reference, Step

CALLS = ("prefill", "first decode step", "second decode step", "second turn")

REPORT = "Please report the model and the command"

Array = NDArray[Any]


@dataclass(frozen=True)
class Outcome:
    """What one engine makes of a sample."""

    kept: tuple[Tensor, ...]  # indices of the survivors: the encoder's, then each site's
    visual: Tensor  # [1, r_1, width], between the graphs
    logits: tuple[Tensor, ...]  # float32 [vocabulary], of each of CALLS

    def keeps_as(self, other: Outcome) -> bool:
        """Whether every site's survivors have the same indices."""
        return all(map(torch.equal, self.kept, other.kept))

    def survivors(self) -> list[set[int]]:
        """Indices in the image of the tokens that survive each site, the encoder first."""
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
        record: GraphRecord,  # of decoder.onnx
        decoder: Decoder,
        dtype: torch.dtype = torch.float32,
        room: int = 128,
        *,
        exact: bool = True,
    ) -> None:
        with _onnxruntime_errors("cannot load"):
            self.vision = session(folder / VISION, exact=exact)
            self.decoder = session(folder / DECODER, exact=exact)
        self.plan, self.config, self.room = decoder.plan, decoder.config, room
        self.image_positions, self.dtype, self.record = decoder.span, dtype, record
        written = [cache.present for cache in record.caches]
        logits = [tensor for tensor in record.outputs if tensor.role == "logits"]
        self.outputs = [tensor.name for tensor in (*logits, *record.kept, *written)]

    def prefill(self, prompt: Prompt) -> Step:
        """An image and a first question; `visual` and `vision_kept` are the vision graph's."""
        self.caches = list[Array]()
        for cache in self.record.caches:
            index = cache.index
            sizes = {f"capacity.{index}": self.plan.counts[index] + self.room, f"past.{index}": 0}
            self.caches.append(torch.zeros(cache.past.shape(sizes), dtype=self.dtype).numpy())
        self.lengths, self.position = np.zeros(len(self.config.layers), np.int64), 0
        with _onnxruntime_errors("cannot run"):
            visual, kept = self.vision.run(None, {"pixels": prompt.pixels.to(self.dtype).numpy()})
        self.visual, self.vision_kept = torch.from_numpy(visual), torch.from_numpy(kept)
        return self._run(prompt.prefix_ids.numpy(), visual, prompt.text_ids.numpy(), kept)

    def step(self, ids: Tensor) -> Step:
        """More text, int64 [1, T]: one token to decode, or the next turn's."""
        empty = torch.zeros(1, 0, self.config.visual_width, dtype=self.dtype).numpy()
        nothing = np.zeros((1, 0), np.int64)
        return self._run(nothing, empty, ids.numpy(), nothing[0])

    def _run(self, prefix_ids: Array, visual: Array, text_ids: Array, indices: Array) -> Step:
        sources = {
            "prefix_ids": prefix_ids,
            "visual": visual,
            "visual_indices": indices,
            "text_ids": text_ids,
            "position": np.array([self.position]),
            "lengths": self.lengths,
        }
        caches = zip(self.record.caches, self.caches, strict=True)
        feeds = {cache.past.name: held for cache, held in caches}
        feeds |= {t.name: sources[t.role] for t in self.record.inputs if t.role in sources}
        with _onnxruntime_errors("cannot run"):
            logits, *rest = self.decoder.run(self.outputs, feeds)
        sites = len(self.record.kept)
        kept, self.caches = rest[:sites], rest[sites:]
        counts = np.minimum(self.plan.counts, visual.shape[1])
        text = prefix_ids.shape[1] + text_ids.shape[1]
        self.lengths = self.lengths + text + counts
        self.position += text + (self.image_positions if visual.shape[1] else 0)
        return Step(
            torch.from_numpy(logits[0, 0].astype(np.float32)),
            tuple(torch.from_numpy(k) for k in kept),
        )


def session(file: Path, *, exact: bool) -> Any:
    """A graph in ONNX Runtime; `exact`: products with quantised weights compute in float32, else
    as they run on a device, with activations rounded."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4  # without bound buffers the cache is copied: meant here
    model: str | bytes = str(file)
    if exact:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        if (copy := without_rounding(file)) is not None:
            folder = str(file.parent)
            options.add_session_config_entry(WEIGHTS_FOLDER, folder)
            model = copy
    else:  # what is rounded, is rounded as the graph says
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return ort.InferenceSession(model, options, ["CPUExecutionProvider"])


WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""Where a session that is given a graph as bytes looks for its weights."""


@contextmanager
def _onnxruntime_errors(what: str) -> Iterator[None]:
    """ParityError in a line where ONNX Runtime fails at a graph."""
    try:
        yield
    except Exception as error:  # onnxruntime raises a kind per status code
        raise ParityError(
            f"ONNX Runtime {what} an exported graph ({brief(error)}); nothing was written. {REPORT}"
        ) from error


def require_finite(outcome: Outcome, name: str, sample: int, advice: str) -> None:
    """ParityError that names the first infinity or NaN of what an engine made of a sample."""
    if where := outcome.not_finite():
        raise ParityError(
            f"{name} gives {where} that are not finite on sample {sample}; nothing was written:"
            f" {advice}"
        )


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
