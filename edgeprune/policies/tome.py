"""ToMe, token merging: in every encoder block the patches most alike become one.

Between attention and MLP the tokens of a block are split in turn into two sets, [CLS] into the
first; each token of the first has a partner, that of the second whose key (mean over heads) has the
largest cosine with its own. The r most alike pairs become their partner's group, [CLS] never.
A group is the mean of its patches, and its size counts in the next attention: log(size) is added to
the logits (proportional attention). The order after each block is that of the released code, what
is left of the first set and then the second; positions are renumbered.
The CR sets the number of patches that leave the encoder; what has to go is spread evenly over its
blocks, earlier where a late block could not halve so many. A block merges half of its patches at
most, so a shallow encoder limits the CR.
The encoder becomes cheaper too, which the CR does not count.

Deviations:
- How many each block merges follows from the CR; the paper gives r.
- Where there is no [CLS], the rest of the first set keeps its order too; the released code sorts it
  by similarity.
- The blocks behind the one whose output the projector reads are not run, so they merge nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from edgeprune.errors import SpecError
from edgeprune.policies import _policy
from edgeprune.policies._counts import ratio
from edgeprune.policies._merge import others
from edgeprune.policies._policy import BlockMerge
from edgeprune.policies._select import TAKEN, ranked, unit
from edgeprune.policies._signals import BlockSignals
from edgeprune.spec import ModelShape, Plan, Stage, floor_cr, merging_plan


@dataclass(frozen=True)
class Policy(_policy.Policy):
    counts: str = "auto"  # or the tokens that stay, such as 64; --cr follows

    paper: ClassVar[str] = "Token Merging: Your ViT But Faster"
    summary: ClassVar[str] = "in every encoder block, the patches most alike become one"
    sites: ClassVar[tuple[str, ...]] = ("block",)

    def sizes(self, shape: ModelShape, cr: float, schedule: _policy.Counts | None = None) -> Plan:
        tokens, cr = shape.visual_tokens, ratio(self.counts, shape, cr)
        plan = merging_plan(shape, cr, share=1, site="block")
        if plan.stages and not shape.blocks:
            raise SpecError(
                "method tome merges the patches of one tile inside the encoder; this model cuts"
                " images into tiles, or reads several patches as one token, [CLS] as a token or"
                " the output of several blocks: choose another method, such as visionzip"
            )
        if tokens - plan.entering > (most := mergeable(tokens, shape.blocks)):
            raise SpecError(
                f"method tome at most halves the tokens in each of {shape.blocks} encoder blocks,"
                f" so --cr is at most {floor_cr(tokens, 1, tokens - most):g}, not {cr:g}; choose a"
                " smaller --cr or another method, such as visionzip"
            )
        return plan

    def why_frozen(self) -> str:
        return _policy.MERGES

    def merge_in_block(self, signals: BlockSignals, stage: Stage) -> BlockMerge | None:
        counts = merges(signals.patches, stage.merged, signals.blocks)
        if not (count := counts[signals.block]):
            return None
        return pairs(signals.keys(), count, protected=signals.cls)


def merges(patches: int, left: int, blocks: int) -> list[int]:
    """How many patches each block merges so that `left` leave the last: as even as can be."""
    counts, excess = list[int](), patches - left
    for later in reversed(range(blocks)):
        count = -(-excess // (later + 1))
        while excess - count > mergeable(patches - count, later):
            count += 1
        counts.append(count)
        patches, excess = patches - count, excess - count
    return counts


def mergeable(patches: int, blocks: int) -> int:
    """How many of the patches `blocks` blocks can merge: half of what is left, each."""
    left = patches
    for _ in range(blocks):
        left -= left // 2
    return patches - left


def pairs(keys: Tensor, count: int, *, protected: bool) -> BlockMerge:
    """The `count` most alike pairs of a token at an even index with its partner at an odd one.

    [S, head]; the `protected` first token has no partner.
    """
    directions = unit(keys)
    even, odd = directions[::2], directions[1::2]
    similar = even @ odd.T  # [ceil(S / 2), floor(S / 2)]
    alike = similar.amax(1)
    if protected:
        first = torch.arange(alike.shape[0], device=keys.device) == 0
        alike = torch.where(first, -TAKEN, alike)
    chosen = ranked(alike, count)
    partners = similar.argmax(1).index_select(0, chosen)
    rest = others(chosen, even.shape[0])
    indices = torch.arange(odd.shape[0], device=keys.device)
    into = (indices[:, None] == partners[None, :]).float()
    stay = torch.cat([2 * rest, 2 * indices + 1])
    return BlockMerge(stay, 2 * chosen, torch.cat([into.new_zeros(rest.shape[0], count), into]))
