"""What chooses the units of patches that go on in the encoder. Ties go to the lower position.

Units come in groups that do not compete: each is a tile, or a window of one. Of all groups the same
number go on, so the choices of all are made at once, each as one row of a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from edgeprune.errors import SpecError
from edgeprune.policies._diverse import determinant
from edgeprune.policies._select import TAKEN, ranked, unit

MOST_STEPS = 1024
"""Of `dpp`, which chooses one unit at a time: each is some nodes of the graph."""


@dataclass(frozen=True)
class SiteSignals:
    """Units before a block: `groups` of n that compete with each other alone."""

    hidden: Tensor  # [groups, n, width], mean over each unit's patches
    contrast: Tensor | None = None  # float32 [groups, n], how far a unit's colours are from usual
    attention: Tensor | None = None  # float32 [groups, n], what [CLS] gives in the block before

    @property
    def count(self) -> int:
        return self.hidden.shape[1]


def marked(indices: Tensor, count: int) -> Tensor:
    """1 at these indices of each row, else 0: int64 [groups, k] -> float32 [groups, count]."""
    places = torch.arange(count, device=indices.device)
    return (indices[:, :, None] == places).float().sum(1)


def largest(scores: Tensor, keep: int) -> Tensor:
    """Marks of the `keep` largest of each row: float32 [groups, n] -> [groups, n]."""
    return marked(ranked(scores, keep), scores.shape[1])


def diverse(tokens: Tensor, keep: int, step: int, weight: Tensor | None = None) -> Tensor:
    """Greedy max-min diversity with distance 1 - cosine: [groups, n, width] -> marks [groups, n].

    First the token whose nearest other is furthest, then those whose nearest chosen is, distances
    times their `weight` [groups, n] > 0 where there is one: 1, 1, 2, 4 .. `step` at a time. With
    step 1 and no weight this is DivPrune's order; with more it takes fewer kernels.
    """
    groups, count, _ = tokens.shape
    directions = unit(tokens)
    distances = 1 - directions @ directions.transpose(1, 2)
    itself = torch.eye(count, device=tokens.device)
    nearest, distances = (distances + TAKEN * itself).amin(2), distances - TAKEN * itself
    rows, first = distances.flatten(0, 1), torch.arange(groups, device=tokens.device) * count
    taken = 0
    while taken < keep:
        more = min(step, max(1, taken), keep - taken)
        worth = nearest if weight is None else nearest.clamp(min=0) * weight + nearest.clamp(max=0)
        best = ranked(worth, more) + first[:, None]  # [groups, more]
        chosen = rows.index_select(0, best.flatten()).view(groups, more, count).amin(1)
        nearest = torch.minimum(nearest, chosen) if taken else chosen
        taken += more
    return (nearest < -TAKEN / 2).float()


def _diverse(signals: SiteSignals, keep: int, step: int) -> Tensor:
    return diverse(signals.hidden, keep, step)


def _salient(signals: SiteSignals, keep: int, step: int) -> Tensor:
    return diverse(signals.hidden, keep, step, _share(signals.attention))


def _contrast(signals: SiteSignals, keep: int, step: int) -> Tensor:
    return diverse(signals.hidden, keep, step, _share(signals.contrast).sqrt())


def _dpp(signals: SiteSignals, keep: int, step: int) -> Tensor:
    """A determinant of the units' directions, times what [CLS] gives each, scaled to 0 .. 1."""
    groups = signals.hidden.shape[0]
    if groups * keep > MOST_STEPS:
        raise SpecError(
            f"by=dpp chooses {groups * keep} units one by one, at most {MOST_STEPS} are written"
            " into a graph; choose by=salient"
        )
    vectors = unit(signals.hidden) * _share(signals.attention)[:, :, None]
    chosen = [determinant(rows, keep, keep) for rows in vectors.unbind(0)]
    return marked(torch.stack(chosen), signals.count)


def _cls(signals: SiteSignals, keep: int, step: int) -> Tensor:
    assert signals.attention is not None
    return largest(signals.attention, keep)


def _pixels(signals: SiteSignals, keep: int, step: int) -> Tensor:
    assert signals.contrast is not None
    return largest(signals.contrast, keep)


def _share(values: Tensor | None) -> Tensor:
    """Scaled to a largest of 1 in each group, and never 0."""
    assert values is not None
    return (values / values.amax(1, keepdim=True).clamp(min=1e-12)).clamp(min=1e-6)


@dataclass(frozen=True)
class Choice:
    """A way to choose, and what it looks at."""

    mask: Callable[[SiteSignals, int, int], Tensor]
    cls: bool = False  # what [CLS] attends to, in a block that has been run
    pixels: bool = False  # colours


CHOICES = {
    "salient": Choice(_salient, cls=True),
    "contrast": Choice(_contrast, pixels=True),
    "diverse": Choice(_diverse),
    "dpp": Choice(_dpp, cls=True),
    "cls": Choice(_cls, cls=True),
    "pixels": Choice(_pixels, pixels=True),
}
"""What `by` may be: diversity times what [CLS] attends to, diversity times how unusual a unit's
colours are, diversity alone, a determinant of diversity and [CLS], or one of the two alone."""


def contrast(pixels: Tensor, rows: int, columns: int, side: int) -> Tensor:
    """How far each unit's colours are from the usual: [tiles, C, H, W] -> float32 [tiles, units].

    Units are squares of `side` pixels, rows x columns of them. Of each the means of its quarters
    are compared with the median over all units of a tile, channel by channel; the mean distance.
    """
    part = side // 2 if side % 2 == 0 else side
    used = pixels[:, :, : rows * side, : columns * side].float()
    means = torch.nn.functional.avg_pool2d(used, part)
    tiles, channels, _, _ = means.shape
    cut = means.view(tiles, channels, rows, side // part, columns, side // part)
    colours = cut.permute(0, 1, 3, 5, 2, 4).reshape(tiles, -1, rows * columns)
    half = (rows * columns) // 2 + 1
    middle = torch.topk(colours, half, dim=-1).values[..., -1:]
    return (colours - middle).abs().mean(1)
