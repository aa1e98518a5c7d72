"""What every vision tower is: blocks between its entry and its exit, and what they hand on.

Policies and the encoder's site see a tower by this alone: they may merge tokens in a block, and
patches may leave before one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from edgeprune.graphs import SIGNALS
from edgeprune.models._encoder_site import EncoderSite, Split
from edgeprune.models._ops import TorchOps
from edgeprune.policies._policy import BlockMerge
from edgeprune.policies._signals import BlockSignals


@dataclass(frozen=True)
class Encoded:
    """What the last block says of a batch of tiles; S = 1 + N with [CLS] first, N without.

    Queries and keys are of the last block in which all these patches take part; None where there is
    none.
    """

    features: Tensor  # [tiles, N, width], its output for the patches; of several blocks, joined
    cls: Tensor | None  # [tiles, 1, width], and for [CLS]
    query: Tensor | None  # [tiles, heads, S, head]
    key: Tensor | None  # [tiles, heads, S, head]
    indices: Tensor | None = None  # int64 [N'], patch of each token, where some were merged
    middle: tuple[Tensor, ...] = ()  # each [tiles, N, width], output of a middle block that is read
    resampled: bool = False  # whether each of the N tokens is a query that attends to patches
    states: tuple[Tensor, ...] = ()  # [tiles, S, width] before each block and after the last, where
    # the whole tower was run
    units: Tensor | None = None  # int64 [tiles, K], the tokens of a tile that are left, rising,
    # where others left for good; the N patches are theirs then, token by token

    @property
    def signals(self) -> dict[str, Tensor]:
        """What is read of a tile, by role."""
        middle = torch.cat(self.middle, dim=-1) if self.middle else None
        all_of = self.features, self.cls, self.query, self.key, middle, self.indices, self.units
        return {role: x for role, x in zip(SIGNALS, all_of, strict=True) if x is not None}


@dataclass(frozen=True)
class Groups:
    """Which patches the tokens of a tile stand for, once some were merged."""

    sizes: Tensor  # float32 [S, 1], how many
    indices: Tensor  # int64 [S], token of the first block that leads each group

    @classmethod
    def of(cls, x: Tensor) -> Groups:
        """Every token by itself: [1, S, width]."""
        ones = torch.ones(x.shape[1], 1, device=x.device)
        return cls(ones, torch.arange(x.shape[1], device=x.device))

    def bias(self, dtype: torch.dtype) -> Tensor:
        """What a group's size adds to its logits, log(size): [S, S] (proportional attention)."""
        return self.sizes.log().T.to(dtype).expand(self.sizes.shape[0], -1)

    def merged(self, x: Tensor, merge: BlockMerge) -> tuple[Tensor, Groups]:
        """The mean over each new group's patches: [1, S, width] -> [1, S', width]."""
        sums = merge.apply(x[0].float() * self.sizes)
        groups = Groups(merge.apply(self.sizes), self.indices.index_select(0, merge.stay))
        return (sums / groups.sizes)[None].to(x.dtype), groups


@dataclass(frozen=True)
class Encoding:
    """A batch of tiles between two blocks."""

    hidden: Tensor  # [tiles, S, width]
    query: Tensor | None = None  # [tiles, heads, S, head], of the block that policies look at
    key: Tensor | None = None
    groups: Groups | None = None  # of tokens, once some were merged
    read: tuple[
        Tensor, ...
    ] = ()  # hidden states that are read beside the last, of the blocks so far
    contrast: Tensor | None = None  # float32 [tiles, units], of the pixels, until units leave by it
    split: Split | None = None  # what has left
    joined: int = 0  # hidden states for which it came back
    some: Tensor | None = None  # int64 [n], in reading order, the patches that these states are of,
    # where they are not of all
    attention_bias: Tensor | None = None  # [tiles, 1, S, S], added to logits; None: nothing is


Attended = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From the keys and values of a block's tokens to those that they attend to."""
PolicyMerge = Callable[[BlockSignals], BlockMerge | None]
"""Policy.merge_in_block of one stage."""


class Tower(nn.Module):
    """A vision transformer: what comes before its blocks, the blocks, and what comes after."""

    blocks: nn.ModuleList
    ops: TorchOps
    site: EncoderSite | None
    looked_at: tuple[int, ...]
    """Blocks whose queries and keys are looked at. By policies: the last one with full attention in
    which all patches take part that the features are of. By a site: the one before it."""

    @property
    def first(self) -> int:
        """Tokens that stand before a tile's patches: 1 with [CLS]."""
        return 0

    @property
    def order(self) -> tuple[int, ...] | None:
        """The patch at each index of the sequence; None: they are in reading order."""
        return None

    def enter(self, pixels: Tensor) -> Encoding:
        """Pixels [tiles, 3, H, W] as they enter the first block."""
        raise NotImplementedError

    def enter_some(self, patches: Tensor, indices: Tensor) -> Encoding:
        """Some patches of a tile, and [CLS], as they enter the first block: pixels
        [n, 3, patch, patch], their indices in reading order int64 [n]."""
        raise NotImplementedError

    def advance(self, number: int, seen: Encoding, policy: PolicyMerge | None = None) -> Encoding:
        """One block, of index `number`; with `policy`, of one tile, it may merge tokens.

        Before the block of the encoder's site patches leave.
        """
        if self.site is not None and number == self.site.config.at:
            seen = self.split(seen, self.site)
        return self.run_block(number, seen, policy)

    def contrast(self, pixels: Tensor, site: EncoderSite | None) -> Tensor | None:
        """How far each unit's colours are from the usual, where a site chooses by that."""
        raise NotImplementedError

    def split(self, seen: Encoding, site: EncoderSite) -> Encoding:
        """Without the patches that leave here."""
        kept, split = site.split(seen.hidden, seen.contrast)
        seen = replace(seen, hidden=kept, contrast=None, split=split)
        return self.without_removed(seen, site, split) if site.drops else seen

    def without_removed(self, seen: Encoding, site: EncoderSite, split: Split) -> Encoding:
        """Without what earlier blocks say of patches that left for good."""
        read = tuple(self.of_chosen(x, site, split) for x in seen.read)
        return replace(seen, read=read, query=None, key=None)

    def of_chosen(self, state: Tensor, site: EncoderSite, split: Split) -> Tensor:
        """A hidden state of all patches as what went on has it."""
        return site.of_chosen(state, split)

    def run_block(
        self,
        number: int,
        seen: Encoding,
        policy: PolicyMerge | None,
        attended: Attended | None = None,
    ) -> Encoding:
        """The block itself; with `attended` its tokens attend to other keys and values."""
        raise NotImplementedError

    def alone(self, number: int, hidden: Tensor, rows: Tensor) -> Tensor:
        """A block with full attention by itself: [sequences, n, width] -> the same. `rows` int64
        [sequences, n] are those of rotary tables, where a tower has them."""
        raise NotImplementedError

    def states(self, seen: Encoding, at: int) -> tuple[Tensor, ...]:
        """After the last block, the states that are read after block `at` has begun, of patches in
        the sequence's order: each [tiles, P, width]. None may have left."""
        raise NotImplementedError

    def whole(self, patches: Tensor, seen: Encoding) -> Tensor:
        """A hidden state that is read, with the patches that left: [tiles, n, width]."""
        if seen.split is None or self.site is None or self.site.drops:
            return patches
        return self.site.rejoin(patches, seen.split, seen.joined)

    def leave(self, seen: Encoding) -> Encoded:
        """Features, queries and keys after the last block."""
        raise NotImplementedError

    def forward(self, pixels: Tensor, policy: PolicyMerge | None = None) -> Encoded:
        """Encode tiles; with `policy` one tile, whose tokens each block may merge."""
        seen = self.enter(pixels)
        states = [seen.hidden]
        for number in range(len(self.blocks)):
            seen = self.advance(number, seen, policy)
            states.append(seen.hidden)
        return replace(self.leave(seen), states=tuple(states))


def looked_at(blocks: int, site: EncoderSite | None) -> tuple[int, ...]:
    """Of a tower whose every block has full attention: `Tower.looked_at`."""
    if site is None:
        return (blocks - 1,)
    before = site.config.at - 1
    return (before, blocks - 1) if site.drops else (before,)
