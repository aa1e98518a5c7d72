"""What stays of each of many images: by a score, by being unlike each other, or by both."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TAIL = 6
"""Tokens between a question and its answer: end of turn, newline, start of turn, role, newline."""


@dataclass(frozen=True)
class Seen:
    """What a selection may look at, after a layer (0: at the decoder's input)."""

    prefix: int
    visual: int  # live visual tokens
    hidden: Tensor  # [B, S, width]
    last: Tensor  # [B], column of the last prompt token among the text
    inputs: Tensor  # [B, visual, width], the live tokens as they entered
    words: Tensor  # [B, T, width], embeddings of the text after the image
    query: Tensor | None = None  # [B, heads, S, size], rotated
    key: Tensor | None = None
    bare_key: Tensor | None = None  # [B, heads, S, size], not rotated
    middle: tuple[Tensor, Tensor] | None = None  # cos, sin of the image's middle

    @property
    def text(self) -> Tensor:
        """Columns of the text: [T]."""
        return torch.arange(self.words.shape[1], device=self.hidden.device)

    def prompt(self) -> Tensor:
        """Which text tokens belong to the prompt: bool [B, T]."""
        return self.text[None] <= self.last[:, None]

    def question(self) -> Tensor:
        """Which belong to the question itself: bool [B, T]."""
        return (self.text[None] <= self.last[:, None] - TAIL) & (self.text[None] > 0)


Score = Callable[[Seen], Tensor]
Select = Callable[[Seen, int], Tensor]


def text_attention(seen: Seen, agnostic: bool) -> Tensor:
    """Attention of text tokens to visual tokens, softmax over all they see: [B, heads, T, n]."""
    assert seen.query is not None and seen.key is not None and seen.bare_key is not None
    start, end = seen.prefix, seen.prefix + seen.visual
    query = seen.query[:, :, end:].float()
    logits = query @ seen.key.float().transpose(-1, -2) / math.sqrt(query.shape[-1])
    if agnostic:
        assert seen.middle is not None
        moved = turned(seen.bare_key[:, :, start:end].float(), *(t.float() for t in seen.middle))
        logits[..., start:end] = query @ moved.transpose(-1, -2) / math.sqrt(query.shape[-1])
    places = torch.arange(logits.shape[-1], device=query.device)
    later = places[None] > places[end:, None]
    weights = logits.masked_fill(later, -torch.inf).softmax(-1)
    return weights[..., start:end]


def last_token(agnostic: bool) -> Score:
    def score(seen: Seen) -> Tensor:
        weights = text_attention(seen, agnostic).mean(1)  # [B, T, n]
        return weights.gather(1, seen.last[:, None, None].expand(-1, 1, weights.shape[-1]))[:, 0]

    return score


def of_words(which: str, agnostic: bool, over_heads: str = "mean") -> Score:
    """Mean over words (`question` or `prompt`) of the mean or largest over heads."""

    def score(seen: Seen) -> Tensor:
        weights = text_attention(seen, agnostic)
        weights = weights.mean(1) if over_heads == "mean" else weights.amax(1)
        mask = (seen.question() if which == "question" else seen.prompt()).float()
        mask = mask / mask.sum(1, keepdim=True)
        return (weights * mask[..., None]).sum(1)

    return score


def cosine(which: str) -> Score:
    """Mean cosine of the input embeddings of image and words; or the largest of the question."""

    def score(seen: Seen) -> Tensor:
        found = F.normalize(seen.inputs, dim=-1) @ F.normalize(seen.words, dim=-1).transpose(1, 2)
        mask = seen.prompt() if which == "prompt" else seen.question()
        if which == "largest":
            return found.masked_fill(~mask[:, None], -torch.inf).amax(-1)
        weight = mask.float() / mask.float().sum(1, keepdim=True)
        return (found * weight[:, None]).sum(-1)

    return score


SCORES: dict[str, Score] = {
    "last": last_token(False),
    "last-agnostic": last_token(True),
    "prompt": of_words("prompt", False),
    "prompt-agnostic": of_words("prompt", True),
    "question": of_words("question", False),
    "question-agnostic": of_words("question", True),
    "question-max": of_words("question", True, "max"),
    "prompt-max": of_words("prompt", True, "max"),
    "cosine": cosine("question"),
    "cosine-prompt": cosine("prompt"),
    "cosine-largest": cosine("largest"),
}


def top(score: str) -> Select:
    return lambda seen, keep: SCORES[score](seen).topk(keep, -1).indices.sort(-1).values


def diverse(features: str, score: str = "", power: float = 1.0) -> Select:
    """Greedy determinant of unit features, times relevance ** power where there is a score."""

    def select(seen: Seen, keep: int) -> Tensor:
        start, end = seen.prefix, seen.prefix + seen.visual
        if features == "input":
            vectors = seen.inputs
        elif features == "hidden":
            vectors = seen.hidden[:, start:end]
        else:
            assert seen.bare_key is not None
            vectors = seen.bare_key[:, :, start:end].transpose(1, 2).flatten(2)
        vectors = F.normalize(vectors.float(), dim=-1)
        if score:
            weight = SCORES[score](seen).float()
            low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
            weight = ((weight - low) / (high - low) + 1e-3) ** power
            vectors = vectors * weight[..., None]
        return determinant(vectors, keep)

    return select


def determinant(vectors: Tensor, keep: int) -> Tensor:
    """Greedy MAP, batched: [B, n, width] -> int64 [B, keep], rising."""
    batch = torch.arange(len(vectors), device=vectors.device)
    kernel = vectors @ vectors.transpose(1, 2)
    left = kernel.diagonal(dim1=1, dim2=2).clone()
    rows = vectors.new_zeros(len(vectors), keep, vectors.shape[1])
    chosen = torch.zeros(len(vectors), keep, dtype=torch.int64, device=vectors.device)
    for step in range(keep):
        best = left.argmax(1)
        chosen[:, step] = best
        row = kernel[batch, best]
        if step:
            before = rows[:, :step]
            row = row - torch.einsum("bk,bkn->bn", before[batch, :, best], before)
        row = row / left[batch, best].clamp(min=1e-12).sqrt()[:, None]
        rows[:, step] = row
        left = left - row * row
        left[batch, best] = -torch.inf
    return chosen.sort(1).values


def spread(seen: Seen, keep: int) -> Tensor:
    """Greedy max-min of cosine distances of the input embeddings (DivPrune)."""
    vectors = F.normalize(seen.inputs.float(), dim=-1)
    far = 1 - vectors @ vectors.transpose(1, 2)
    batch = torch.arange(len(far), device=far.device)
    itself = torch.eye(far.shape[1], device=far.device).bool()
    nearest = far.masked_fill(itself, torch.inf).amin(2)
    chosen = torch.zeros(len(far), keep, dtype=torch.int64, device=far.device)
    for step in range(keep):
        best = nearest.argmax(1)
        chosen[:, step] = best
        row = far[batch, best]
        nearest = torch.minimum(nearest, row) if step else row.clone()
        nearest[batch[:, None], chosen[:, : step + 1]] = -torch.inf
    return chosen.sort(1).values


def selection(name: str) -> Select:
    """`top:SCORE`, `dpp:FEATURES[:SCORE:POWER]` or `spread`."""
    kind, *rest = name.split(":")
    if kind == "spread":
        return spread
    if kind == "top":
        return top(rest[0])
    return diverse(rest[0], *(rest[1:2]), *(float(power) for power in rest[2:3]))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin
