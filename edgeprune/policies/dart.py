"""DART: a few pivots, and the tokens that repeat them least.

After layer K the visual tokens and the text tokens with the largest keys (L1 norm over all heads)
become pivots, 4 of each. Pivot after pivot, the visual ones first, takes the free visual tokens
least alike (cosine of hidden states) to it, each an equal share of the budget; the visual pivots
stay too. Layers 1..K see every visual token, all others the R that stay, and R follows from the CR:
(V L / CR - K V) / (L - K). Positions are kept.

Deviations:
- The released code goes through pivots in the order of a hash table, here they go by the size of
  their keys.
- It applies the decoder's last norm, whose weights a site does not see, before it takes cosines.
- Its shares are floor(M / 8) of a number M given beside the reduction; here they add up to R.
- With fewer text tokens than pivots the last text token is a pivot again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from edgeprune.errors import SpecError
from edgeprune.policies import _policy
from edgeprune.policies._counts import ratio
from edgeprune.policies._diverse import unlike
from edgeprune.policies._policy import Selection
from edgeprune.policies._schedules import after_layer, layer_at
from edgeprune.policies._select import ranked, top
from edgeprune.policies._signals import LayerSignals
from edgeprune.spec import ModelShape, Plan, Stage


@dataclass(frozen=True)
class Policy(_policy.Policy):
    K: int = 2  # layers that see every visual token
    image_pivots: int = 4
    text_pivots: int = 4
    counts: str = "auto"  # or the tokens that stay after layer K, such as 128; --cr follows

    paper: ClassVar[str] = (
        "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More"
    )
    summary: ClassVar[str] = "after layer K, the tokens least alike to a few pivots"
    sites: ClassVar[tuple[str, ...]] = ("layer",)
    needs: ClassVar[tuple[str, ...]] = ("text",)

    def sizes(self, shape: ModelShape, cr: float, schedule: _policy.Counts | None = None) -> Plan:
        if min(self.image_pivots, self.text_pivots) < 0 or self.image_pivots + self.text_pivots < 1:
            raise SpecError(
                "--set image_pivots= and text_pivots= are numbers of tokens, not both 0; got"
                f" {self.image_pivots} and {self.text_pivots}"
            )
        last = layer_at(self.K, shape)
        return after_layer("dart", last, shape, ratio(self.counts, shape, cr, last))

    def why_frozen(self) -> str:
        return _policy.ONE_BY_ONE

    def layer(self, signals: LayerSignals, stage: Stage, live: Stage) -> Selection:
        sizes = signals.states.rotated_key[0].float().abs().sum((0, 2))
        start, end = signals.segments.prefix, signals.segments.prefix + signals.segments.visual
        visual, text = signals.visual[0], signals.text[0]
        own = min(self.image_pivots, stage.keep)
        pivots, taken = _largest(visual, sizes[start:end], own)
        if stage.keep > own:
            last = text[-1:].expand(self.text_pivots, -1)
            others, _ = _largest(text, sizes[end:], self.text_pivots, last)
            quotas = _shares(stage.keep - own, own + self.text_pivots)
            taken = unlike(visual, torch.cat([pivots, others]), quotas, taken)
        return Selection(top(taken, live.keep))


def _largest(
    tokens: Tensor, sizes: Tensor, count: int, spare: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The `count` tokens of the largest sizes, and marks of them: [count, width], float32 [n].

    Where there are fewer tokens, as in a decode step, `spare` [count, width] takes their place,
    zeros if there is none.
    """
    spare = tokens.new_zeros(count, tokens.shape[1]) if spare is None else spare
    best = ranked(torch.cat([sizes, sizes.new_full((count,), -1)]), count)
    indices = torch.arange(tokens.shape[0], device=tokens.device)
    marks = (indices[None, :] == best[:, None]).float().sum(0)
    return torch.cat([tokens, spare]).index_select(0, best), marks


def _shares(total: int, parts: int) -> list[int]:
    """`total` in parts that differ by one at most, the larger first."""
    return [total // parts + (part < total % parts) for part in range(parts)]
