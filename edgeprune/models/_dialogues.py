"""A dialogue about an image: a prefill, two decode steps and a second turn on one cache.

The tokens of the later calls are given, so all of them can go through a layer together, and its
cache is forgotten after that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgeprune.models._decoder import Decoder
from edgeprune.models._processor import Prompt

CALLS = ("prefill", "first decode step", "second decode step", "second turn")


@dataclass(frozen=True)
class Call:
    """The text of one call of a dialogue, and what stands before it in the caches."""

    prefix_ids: Tensor  # int64 [1, P]
    text_ids: Tensor  # int64 [1, T]
    position: Tensor  # int64 [1]
    lengths: Tensor  # int64 [layers]


def calls_about(prompt: Prompt, decoder: Decoder) -> tuple[Call, ...]:
    """A sample's dialogue: its first token is decoded, then its last, then it is asked again."""
    counts = torch.tensor(decoder.plan.counts)
    position, lengths, found = 0, torch.zeros_like(counts), list[Call]()
    nothing, text = prompt.text_ids[:, :0], prompt.text_ids
    turns = [(prompt.prefix_ids, text)]
    turns += [(nothing, ids) for ids in (text[:, :1], text[:, -1:], text)]
    for number, (before, after) in enumerate(turns):
        found.append(Call(before, after, torch.tensor([position]), lengths))
        new = before.shape[1] + after.shape[1]
        position += new if number else new + decoder.span
        lengths = lengths + (new if number else new + counts)
    return tuple(found)


@dataclass(frozen=True)
class Outcome:
    """What one engine makes of a sample."""

    kept: tuple[Tensor, ...]  # indices of the survivors: the encoder's, then each site's
    visual: Tensor  # [1, r_1, width], between the graphs
    logits: tuple[Tensor, ...]  # float32 [vocabulary], of each of CALLS

    def survivors(self) -> list[set[int]]:
        """Indices in the image of the tokens that survive each site, the encoder first."""
        alive, *later = self.kept
        survivors = [alive]
        for kept in later:
            survivors.append(survivors[-1][kept])
        return [set(indices.tolist()) for indices in survivors]

    def not_finite(self) -> str:
        """Where the first infinity or NaN is; empty where every number is finite."""
        if not bool(self.visual.isfinite().all()):
            return "visual tokens"
        calls = zip(CALLS, self.logits, strict=True)
        return next((f"logits of the {c}" for c, v in calls if not bool(v.isfinite().all())), "")
