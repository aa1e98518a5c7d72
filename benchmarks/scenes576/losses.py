"""What is trained: answers of the language model, visual tokens of the tower, and their scores."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.scenes576 import symbols
from benchmarks.scenes576.decoder import Decoder, Layout, Lora, logits, states
from benchmarks.scenes576.pools import SLOT, Batch
from benchmarks.scenes576.questions import KINDS
from benchmarks.scenes576.symbols import CENTRE, GROUND, GROUPS, LENGTH, Table
from benchmarks.scenes576.tower import Sight

END_WEIGHT = 0.3  # of the loss at an answer's end


@dataclass
class Model:
    """All parts under training, on one device."""

    decoder: Decoder
    lora: Lora
    sight: Sight
    heads: nn.ModuleList  # throwaway: what is there, from [CLS] before the last layer and pooled
    table: Table
    prefix: Tensor  # ids int64 before the image

    @property
    def device(self) -> torch.device:
        return self.prefix.device

    @property
    def dtype(self) -> torch.dtype:
        """Of matrix products."""
        return self.decoder.dtype


@dataclass
class Scores:
    """Sums over steps, on the device: right and asked questions of each kind, named means."""

    right: Tensor
    asked: Tensor
    means: dict[str, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def fresh(cls, device: torch.device) -> Scores:
        """Nothing counted yet."""
        return cls(*(torch.zeros(len(KINDS), device=device) for _ in range(2)))

    def count(self, right: Tensor, kinds: Tensor) -> None:
        """Count questions [batch, slots]."""
        self.right.index_add_(0, kinds.flatten(), right.flatten().float())
        self.asked.index_add_(0, kinds.flatten(), torch.ones_like(right.flatten().float()))

    def mean(self, name: str, value: Tensor) -> None:
        """Note one value of a mean."""
        self.means.setdefault(name, []).append(value.detach())

    @property
    def accuracy(self) -> float:
        """Share of right answers, the mean over kinds."""
        share = self.right / self.asked.clamp(min=1)
        return float(share[self.asked > 0].mean()) if bool((self.asked > 0).any()) else 0.0

    def summary(self) -> dict[str, float]:
        """Everything by name, rounded."""
        rows = zip(KINDS, self.right.tolist(), self.asked.tolist(), strict=True)
        found = {kind: r / n for kind, r, n in rows if n}
        found |= {name: float(torch.stack(v).float().mean()) for name, v in self.means.items()}
        return {name: round(value, 4) for name, value in found.items()}


def answer_logits(model: Model, weights: list[tuple[Tensor, ...]], tokens: Tensor,
                  batch: Batch) -> Tensor:  # fmt: skip
    """Scores [batch, slots, ANSWER, vocabulary] where answers are predicted, given visual tokens
    [batch, patches, width]."""
    n, slots, _ = batch.ids.shape
    embed = model.decoder.embed
    layout = Layout(len(model.prefix) + tokens.shape[1], slots, SLOT)
    start = embed[model.prefix].expand(n, -1, -1)
    text = F.pad(batch.ids.flatten(1), (0, layout.text - slots * SLOT))
    found = states(model.decoder, weights, torch.cat([start, tokens, embed[text]], 1), layout)
    at = torch.arange(slots, device=text.device)[:, None] * SLOT + batch.columns + layout.prefix
    at = at.flatten(1)[..., None].expand(-1, -1, found.shape[-1])
    return logits(model.decoder, found.gather(1, at)).view(*batch.columns.shape, -1)


def answer_loss(model: Model, weights: list[tuple[Tensor, ...]], tokens: Tensor, batch: Batch,
                scores: Scores) -> Tensor:  # fmt: skip
    """Cross-entropy of answers and their ends; a question counts as right where all tokens are."""
    guesses = answer_logits(model, weights, tokens, batch)
    targets = batch.targets
    loss = F.cross_entropy(guesses.flatten(0, 2), targets.flatten(), reduction="none")
    asked = targets >= 0
    last = asked & ~F.pad(asked, (0, 1))[..., 1:]
    weight = asked.float() - (1 - END_WEIGHT) * last
    right = ((guesses.argmax(-1) == targets) | ~asked).all(-1)
    scores.count(right, batch.kinds)
    total = (loss.view_as(weight) * weight).sum() / weight.sum()
    scores.mean("loss", total)
    return total


def spoil(tokens: Tensor, level: float, rng: torch.Generator) -> Tensor:
    """Imperfect visual tokens: noise, and some patches mixed with a neighbour in reading order."""
    n, patches, _ = tokens.shape
    device = tokens.device
    mix = torch.rand(n, patches, 1, generator=rng, device=device) * 0.5
    mix *= torch.rand(n, patches, 1, generator=rng, device=device) < 0.3 * level
    tokens = tokens + mix * (tokens.roll(1, 1) - tokens)
    strength = 0.1 * level * torch.rand(n, 1, 1, generator=rng, device=device)
    return tokens + strength * torch.randn(tokens.shape, generator=rng, device=device)


def patch_loss(table: Table, tokens: Tensor, truth: Tensor, scores: Scores) -> Tensor:
    """Distance of visual tokens from ideal ones, and classification by the symbols themselves."""
    weight = torch.where(truth[..., 4] == GROUND, 1.0, 4.0)
    far = (tokens - table.ideal(truth)).square().sum(-1) / LENGTH**2
    loss = (far * weight).mean() / 2
    scores.mean("distance", far.mean())
    names = {"color": 0, "shape": 1, "tens": 2, "ones": 3}
    for name, column in names.items():
        first, end = GROUPS[name]
        target = truth[..., column].long() - first
        shown = target >= 0
        guess = tokens @ table.rows[first:end].T
        target = target.masked_fill(~shown, -100)
        losses = F.cross_entropy(guess.flatten(0, 1), target.flatten(), reduction="sum")
        count = shown.sum().clamp(min=1)
        loss = loss + losses / count * (1.0 if column >= 2 else 0.5)
        scores.mean(f"patch_{name}", ((guess.argmax(-1) == target) & shown).sum() / count)
    centre = (tokens @ table.rows[CENTRE]) / LENGTH**2
    right = (centre > 0.5) == (truth[..., 4] == CENTRE)
    scores.mean("wrong_centres", (~right).float().sum(1).mean())
    return loss


def cls_loss(model: Model, cls: tuple[Tensor, ...], present: Tensor, scores: Scores) -> Tensor:
    """[CLS] knows what is there: its attention then falls on the objects."""
    loss = torch.zeros((), device=present.device)
    for head, state in zip(model.heads, cls, strict=True):
        guess = head(F.layer_norm(state, state.shape[-1:]))
        loss = loss + 4 * F.binary_cross_entropy_with_logits(guess, present)
        recall = ((guess > 0).float() * present).sum() / present.sum().clamp(min=1)
    scores.mean("cls_recall", recall)
    return loss


def language_loss(model: Model, batch: Batch, level: float, rng: torch.Generator,
                  scores: Scores) -> Tensor:  # fmt: skip
    """Answers from ideal visual tokens with some noise."""
    tokens = spoil(model.table.ideal(batch.symbols), level, rng)
    return answer_loss(model, model.lora.merged(model.decoder), tokens, batch, scores)


def vision_loss(model: Model, batch: Batch, scores: Scores) -> Tensor:
    """Ideal visual tokens from pixels."""
    assert batch.pixels is not None
    tokens, *cls = model.sight(batch.pixels, model.dtype)
    loss = patch_loss(model.table, tokens, batch.symbols, scores)
    return loss + cls_loss(model, tuple(cls), batch.present, scores)


def joint_loss(model: Model, batch: Batch, scores: Scores, patches: float = 0.2) -> Tensor:
    """Answers from pixels; tower and projector go on learning, held near to ideal tokens."""
    assert batch.pixels is not None
    tokens, *cls = model.sight(batch.pixels, model.dtype)
    seen = patch_loss(model.table, tokens, batch.symbols, scores)
    seen = seen + cls_loss(model, tuple(cls), batch.present, scores)
    weights = model.lora.merged(model.decoder)
    return answer_loss(model, weights, tokens, batch, scores) + patches * seen


assert symbols.WAVES == 18
