"""Parity: an exported pair of graphs against the eager reference of the same policy.

Each sample is prefilled, decoded for two tokens and asked again on the same cache. The places that
each site's survivors take must be the same, the visual tokens, merged ones too, and all logits
within a tolerance. Where they are not, it may be a tie: two engines round differently, and a choice
between equals falls otherwise. Then the reference, its pixels off by no more than rounding, makes
the graph's choice itself; such a sample is counted and not compared further.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference of two values, as a share of the largest of them where that is above 1."""

NUDGES = {torch.float32: 192, torch.float16: 48, torch.bfloat16: 48}
"""So many times pixels are changed by rounding before a difference is called one: where a greedy
order has gone down to little, one in twenty was seen to turn a choice as another engine does."""

REPORT = "Please report the model and the command"

Array = NDArray[Any]


@dataclass(frozen=True)
class Parity:
    """Over all samples: how many, how many differed by a tie, the largest differences."""

    samples: int
    ties: int
    visual: float
    logits: float
    tolerance: float


@dataclass(frozen=True)
class Outcome:
    """What one engine makes of a sample."""

    places: tuple[Tensor, ...]  # whose places the survivors took: in the encoder, then at each site
    visual: Tensor  # [1, r_1, width], between the graphs
    logits: tuple[Tensor, ...]  # of the prefill, two decode steps and a second turn


class Graphs:
    """The two graphs in ONNX Runtime, fed plainly: no bound buffers, every present a new array."""

    def __init__(self, folder: Path, decoder: Decoder, room: int = 128) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4  # without bound buffers the cache is copied: meant here
        providers = ["CPUExecutionProvider"]
        with _told("cannot load"):
            self.vision = ort.InferenceSession(folder / "vision.onnx", options, providers)
            self.decoder = ort.InferenceSession(folder / "decoder.onnx", options, providers)
        self.plan, self.config, self.room = decoder.plan, decoder.config, room
        self.span = decoder.span
        self.dtype = decoder.embedding.weight.dtype
        self.kept = self.plan.kept_outputs
        ends = {end.name: end.shape for end in self.decoder.get_inputs()}
        self.shapes = {n[5:]: shape for n, shape in ends.items() if n.startswith("past_")}

    def prefill(self, prompt: Prompt) -> Step:
        """A picture and a first question; `visual` and `vision_kept` are the vision graph's."""
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


def check(
    folder: Path,
    reference: Reference,
    prompts: Iterable[Prompt],
    progress: Callable[[int], None] = lambda done: None,
) -> Parity:
    """Compare a draft bundle with its reference; ParityError where they disagree."""
    graphs, tolerance = Graphs(folder, reference.decoder), TOLERANCE[reference.dtype]
    visual, logits, ties, done = 0.0, 0.0, 0, 0
    for prompt in prompts:
        wanted, token = _play(reference, prompt)
        found, _ = _play(graphs, prompt, token)
        if _agree(found, wanted, tolerance):
            visual = max(visual, _difference(found.visual, wanted.visual))
            logits = max(logits, _worst(found, wanted))
        elif _is_tie(reference, prompt, token, found, wanted, tolerance):
            ties += 1
        else:
            raise ParityError(f"{_fault(found, wanted, tolerance)}; nothing was written. {REPORT}")
        done += 1
        progress(done)
    if reference.dtype == torch.float32 and ties == done > 0:
        raise ParityError(
            "the exported graph keeps other tokens than the eager reference, if only by a tie, on"
            f" all {done} samples; nothing was written. {REPORT}"
        )
    return Parity(done, ties, visual, logits, tolerance)


def _play(
    engine: Reference | Graphs, prompt: Prompt, token: Tensor | None = None
) -> tuple[Outcome, Tensor]:
    """A prefill, two decode steps, the first of `token`, and a second turn on the same cache.

    Without a `token` int64 [1, 1] it is the likeliest one, which is returned.
    """
    first = engine.prefill(prompt)
    visual, kept = engine.visual, engine.vision_kept
    token = first.logits.argmax()[None, None] if token is None else token
    later = [engine.step(ids) for ids in (token, prompt.text_ids[:, -1:], prompt.text_ids)]
    logits = tuple(step.logits for step in (first, *later))
    return Outcome((kept, *first.kept), visual, logits), token


def _agree(found: Outcome, wanted: Outcome, tolerance: float) -> bool:
    same = all(map(torch.equal, found.places, wanted.places))
    visual = same and _difference(found.visual, wanted.visual) <= tolerance
    return visual and _worst(found, wanted) <= tolerance


def _worst(found: Outcome, wanted: Outcome) -> float:
    return max(map(_difference, found.logits, wanted.logits))


def _difference(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, as a share of the largest value where that is above 1."""
    scale = max(1.0, float(wanted.abs().max()))
    return float((wanted - found).abs().max()) / scale


def _is_tie(
    reference: Reference,
    prompt: Prompt,
    token: Tensor,
    found: Outcome,
    wanted: Outcome,
    tolerance: float,
) -> bool:
    """Whether the reference answers as the graph when its pixels are off by rounding.

    Where many choices are close, as in a greedy order, no two roundings turn the same ones. The
    graph is right then too if it keeps what is kept always, and nothing that never is. In half
    precision it is enough that the reference does not stand by its own answer.
    """
    others = [wanted]
    for nudged in _nudges(prompt, reference.dtype):
        other, _ = _play(reference, nudged, token)
        if reference.dtype != torch.float32:
            if not _agree(other, wanted, tolerance):
                return True
        elif _agree(found, other, tolerance):
            return True
        others.append(other)
    return reference.dtype == torch.float32 and _is_among(found, others)


def _is_among(found: Outcome, others: Sequence[Outcome]) -> bool:
    """Whether a choice that nobody else made is made of choices that some did, site by site."""
    if any(all(map(torch.equal, found.places, other.places)) for other in others):
        return False  # the same choice, in the same order, so something else differs
    chosen, rest = _chosen(found), [_chosen(other) for other in others]
    sites = zip(chosen, *rest, strict=True)
    return all(set.intersection(*seen) <= own <= set.union(*seen) for own, *seen in sites)


def _chosen(outcome: Outcome) -> list[set[int]]:
    """The places in the picture that survive each pruning site."""
    alive, *later = outcome.places
    survivors = [alive]
    for kept in later:
        survivors.append(survivors[-1][kept])
    return [set(places.tolist()) for places in survivors]


def _nudges(prompt: Prompt, dtype: torch.dtype) -> Iterator[Prompt]:
    """The prompt with noise of 2 to 512 units in the last place of its largest pixel.

    Rounding adds up from layer to layer, the noise of many pixels averages out within a patch. In
    half precision 16 units are noise enough.
    """
    steps = 9 if dtype == torch.float32 else 4
    generator = torch.Generator().manual_seed(0)
    unit = torch.finfo(dtype).eps * float(prompt.pixels.abs().max())
    for nudge in range(NUDGES[dtype]):
        noise = torch.randn(prompt.pixels.shape, generator=generator)
        yield replace(prompt, pixels=prompt.pixels + 2 ** (1 + nudge % steps) * unit * noise)


def _fault(found: Outcome, wanted: Outcome, tolerance: float) -> str:
    """Where two outcomes part first."""
    if not all(map(torch.equal, found.places, wanted.places)):
        return "the exported graph keeps other tokens than the eager reference"
    visual = _difference(found.visual, wanted.visual)
    what, by = (
        ("visual tokens", visual) if visual > tolerance else ("logits", _worst(found, wanted))
    )
    return (
        f"the exported graph's {what} differ from the eager reference by {by:.2e}, at most"
        f" {tolerance:g} is right"
    )
