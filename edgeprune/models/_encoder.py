"""A vision transformer over square tiles: CLIP, SigLIP and InternViT are settings of it.

They differ in what stands around the same blocks: a [CLS] token, a norm before the first block or
after the last, norms of queries and keys, a gain on each branch. What a tower lacks is an identity
here, so the forward passes have no branches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from edgeprune.models._encoder_site import EncoderSite, Runs, SiteConfig, Split, Units
from edgeprune.models._layers import (
    ACTIVATIONS,
    Gain,
    LayerNorm,
    Linear,
    Narrow,
    RMSNorm,
    Scores,
    Sum,
    common,
    join_heads,
    split_heads,
)
from edgeprune.models._ops import TorchOps
from edgeprune.models._vision_tower import (
    Attended,
    Encoded,
    Encoding,
    Groups,
    PolicyMerge,
    Tower,
    looked_at,
)
from edgeprune.policies._policy import BlockMerge
from edgeprune.policies._signals import BlockSignals


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """Sizes of a vision transformer, cut after the block whose output is read."""

    blocks: int  # that are run: the tower's, less those after the chosen hidden state
    width: int
    mlp_width: int
    heads: int
    image: int  # pixels a side of a tile
    patch: int
    eps: float
    activation: str
    cls: bool = True
    patch_bias: bool = False
    qkv_bias: bool = True
    pre_norm: bool = False  # before the first block
    post_norm: bool = False  # after the last
    qk_norm: bool = False  # RMS norms of queries and keys over all heads
    gain: bool = False  # learned factors on the two branches of a block
    rms_norm: bool = False  # the blocks' norms are RMS norms
    branch_norms: bool = False  # they stand behind attention and MLP, not before
    joined: tuple[int, ...] = ()  # after how many blocks each of several hidden states is read, to
    # stand side by side; (): what the last gives is read alone
    left_out: int = 0  # blocks that the tower has after these

    @property
    def side(self) -> int:
        """Patches a side of a tile."""
        return self.image // self.patch

    @property
    def patches(self) -> int:
        """Of a tile."""
        return self.side**2

    @property
    def merging_blocks(self) -> int:
        """Blocks that may merge tokens: none where hidden states of several are read."""
        return 0 if self.joined else self.blocks

    @property
    def features(self) -> int:
        """Channels of what is read."""
        return self.width * max(1, len(self.joined))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a tile in pixels."""
        return self.image, self.image

    def units(self, side: int) -> Units:
        """The patches of a tile as squares of `side` x `side`."""
        patches = self.side**2
        return Units.of(range(patches), (self.side, self.side), side, ((1, patches),))

    def states_after(self, at: int) -> int:
        """Hidden states that are read after block `at` has begun."""
        return sum(number > at for number in set(self.joined)) if self.joined else 1

    def windows(self, block: int, site: SiteConfig | None = None) -> Runs:
        """What attends to itself alone in a block: one window of all tokens."""
        kept = site.kept_runs[0][1] if site and block >= site.at else self.side**2
        return ((1, kept + self.cls),)

    @property
    def spans(self) -> int:
        """Images or frames that are encoded as one."""
        return 1

    @property
    def products(self) -> int:
        """Of the MLP of a block."""
        return 2

    @property
    def inputs(self) -> int:
        """Numbers of a patch."""
        return 3 * self.patch**2

    def build(self, ops: TorchOps, site: SiteConfig | None = None) -> Encoder:
        return Encoder(self, ops, site)


ChooseMerge = Callable[[Tensor], BlockMerge | None]
"""From the keys [tiles, heads, S, head] of a block to the tokens that it merges, if any."""


class Block(nn.Module):
    def __init__(self, config: EncoderConfig, ops: TorchOps) -> None:
        super().__init__()
        self.config = config
        width, norm = config.width, RMSNorm if config.rms_norm else LayerNorm
        self.attention_norm = norm(width, config.eps, ops)
        self.query = Narrow(width, width, ops, config.qkv_bias)
        self.key = Narrow(width, width, ops, config.qkv_bias)
        self.value = Narrow(width, width, ops, config.qkv_bias)
        self.query_norm = RMSNorm(width, 1e-6, ops) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(width, 1e-6, ops) if config.qk_norm else nn.Identity()
        self.scores = Scores(ops)
        self.output = Linear(width, width, ops, bias=True)
        self.attention_gain = Gain(width) if config.gain else nn.Identity()
        self.mlp_norm = norm(width, config.eps, ops)
        self.up = Linear(width, config.mlp_width, ops, bias=True)
        self.down = Linear(config.mlp_width, width, ops, bias=True)
        self.mlp_gain = Gain(width) if config.gain else nn.Identity()
        self.residual = Sum()

    def forward(
        self,
        x: Tensor,
        groups: Groups | None,
        choose_merge: ChooseMerge,
        attended: Attended | None = None,
        attention_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Groups | None]:
        """Output [tiles, S', width], query and key [tiles, heads, S, head], S' groups of tokens.

        S' < S where `choose_merge` names tokens, which are merged between attention and MLP. With
        `attended` the tokens attend to other keys and values than their own, which are returned.
        """
        behind, heads = self.config.branch_norms, self.config.heads
        normed = x if behind else self.attention_norm(x)
        query = split_heads(self.query_norm(self.query(normed)), heads)
        key = split_heads(self.key_norm(self.key(normed)), heads)
        value = split_heads(self.value(normed), heads)
        if attended is not None:
            key, value = attended(key, value)
        assert attention_bias is None or groups is None  # no tower with padding merges
        bias = attention_bias if groups is None else groups.bias(query.dtype)
        mixed = self.output(join_heads(self.scores(query, key, value, bias)))
        mixed = self.attention_norm(mixed) if behind else mixed
        x = self.residual(x, self.attention_gain(mixed))
        if (merge := choose_merge(key)) is not None:
            groups = groups or Groups.of(x)
            x, groups = groups.merged(x, merge)
        activation = ACTIVATIONS[self.config.activation]
        mapped = self.down(activation(self.up(x if behind else self.mlp_norm(x))))
        mapped = self.mlp_norm(mapped) if behind else mapped
        x = self.residual(x, self.mlp_gain(mapped))
        return x, query, key, groups


class Encoder(Tower):
    """Pixels [tiles, 3, H, W] to features, queries and keys."""

    def __init__(
        self, config: EncoderConfig, ops: TorchOps, site: SiteConfig | None = None
    ) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.site = EncoderSite(site, ops) if site else None
        self.looked_at = looked_at(config.blocks, self.site)
        positions = config.side**2 + config.cls
        self.cls = nn.Parameter(torch.empty(config.width)) if config.cls else None
        patch, bias = config.patch, config.patch_bias
        self.patch: nn.Module = nn.Conv2d(3, config.width, patch, patch, bias=bias)
        self.position = nn.Parameter(torch.empty(positions, config.width))
        norm = (config.width, config.eps, ops)
        self.pre_norm = LayerNorm(*norm) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, ops) for _ in range(config.blocks))
        self.post_norm = LayerNorm(*norm) if config.post_norm else nn.Identity()

    def enter(self, pixels: Tensor) -> Encoding:
        x = self.patches(pixels)
        if self.cls is not None:
            x = torch.cat([self.cls.expand(x.shape[0], 1, -1), x], dim=1)
        x = self.pre_norm(x + self.positions())
        read = (x,) if 0 in self.config.joined else ()
        return Encoding(x, read=read, contrast=self.contrast(pixels, self.site))

    @property
    def first(self) -> int:
        return int(self.cls is not None)

    def enter_some(self, patches: Tensor, indices: Tensor) -> Encoding:
        positions = self.positions()
        x = self.embedded(patches) + positions.index_select(0, indices + self.first)
        if self.cls is not None:
            x = torch.cat([(self.cls + positions[0])[None, None], x], dim=1)
        x = self.pre_norm(x)
        return Encoding(x, read=(x,) if 0 in self.config.joined else (), some=indices)

    def embedded(self, patches: Tensor) -> Tensor:
        """The embedding of patches that are given one by one: [n, 3, patch, patch] ->
        [1, n, width]."""
        embedded: Tensor = self.patch(patches).flatten(1)[None]
        return embedded

    def patches(self, pixels: Tensor) -> Tensor:
        """The embedding of each patch, row by row: [tiles, 3, H, W] -> [tiles, N, width]."""
        embedded: Tensor = self.patch(pixels).flatten(2).transpose(1, 2)
        return embedded

    def positions(self) -> Tensor:
        """What is added to the tokens of a tile: [S, width]."""
        return self.position

    def contrast(self, pixels: Tensor, site: EncoderSite | None) -> Tensor | None:
        if site is None or not site.looks_at_pixels:
            return None
        return site.contrast(pixels, self.config.patch)

    def split(self, seen: Encoding, site: EncoderSite) -> Encoding:
        first, attention = int(self.cls is not None), None
        if site.looks_at_cls:
            attention = _cls_attention(seen)
        kept, split = site.split(seen.hidden[:, first:], seen.contrast, attention)
        hidden = torch.cat([seen.hidden[:, :first], kept], dim=1) if first else kept
        seen = replace(seen, hidden=hidden, contrast=None, split=split)
        return self.without_removed(seen, site, split) if site.drops else seen

    def of_chosen(self, state: Tensor, site: EncoderSite, split: Split) -> Tensor:
        first = int(self.cls is not None)
        patches = site.of_chosen(state[:, first:], split)
        return torch.cat([state[:, :first], patches], dim=1) if first else patches

    def run_block(
        self,
        number: int,
        seen: Encoding,
        policy: PolicyMerge | None,
        attended: Attended | None = None,
    ) -> Encoding:
        choose = self._choose_in(number, policy)
        x, query, key, groups = self.blocks[number](
            seen.hidden, seen.groups, choose, attended, seen.attention_bias
        )
        if number not in self.looked_at:
            query, key = seen.query, seen.key
        seen = replace(seen, hidden=x, query=query, key=key, groups=groups)
        if number + 1 not in self.config.joined:
            return seen
        joined = seen.joined + (seen.split is not None)
        return replace(seen, read=(*seen.read, self._with_cls(x, seen)), joined=joined)

    def leave(self, seen: Encoding) -> Encoded:
        x, first = self.post_norm(seen.hidden), int(self.cls is not None)
        cls = x[:, :1] if first else None
        if joined := self.config.joined:
            states = dict(zip(sorted(set(joined)), seen.read, strict=True))
            x = torch.cat(common(False, *(states[number] for number in joined)), dim=-1)
            cls, features = x[:, :1] if first else None, x[:, first:]
        else:
            features = self.whole(x[:, first:], seen)
        indices = None if seen.groups is None else seen.groups.indices[first:] - first
        units = None
        if seen.split is not None and self.site is not None and self.site.drops:
            units, _ = self.site.kept_tokens(seen.split)  # they stand in that order
        return Encoded(features, cls, seen.query, seen.key, indices, units=units)

    def alone(self, number: int, hidden: Tensor, rows: Tensor) -> Tensor:
        found: Tensor = self.blocks[number](hidden, None, lambda key: None)[0]
        return found

    def states(self, seen: Encoding, at: int) -> tuple[Tensor, ...]:
        first = int(self.cls is not None)
        if not self.config.joined:
            return (self.post_norm(seen.hidden)[:, first:],)
        states = zip(sorted(set(self.config.joined)), seen.read, strict=True)
        return tuple(x[:, first:] for number, x in states if number > at)

    def _with_cls(self, x: Tensor, seen: Encoding) -> Tensor:
        """A state that is read: [tiles, 1 + n, width] with the patches that left."""
        if seen.split is None:
            return x
        first = int(self.cls is not None)
        whole = self.whole(x[:, first:], seen)
        return torch.cat(common(False, x[:, :first], whole), dim=1) if first else whole

    def _choose_in(self, block: int, policy: PolicyMerge | None) -> ChooseMerge:
        """What a policy merges in one block, by its keys."""
        if policy is None:
            return lambda key: None
        blocks, patches = len(self.blocks), self.config.side**2
        return lambda key: policy(BlockSignals(key, block, blocks, patches, self.config.cls))


def _cls_attention(seen: Encoding) -> Tensor:
    """What [CLS] gives each patch in the block that was looked at, head mean: [tiles, patches]."""
    assert seen.query is not None and seen.key is not None
    logits = seen.query[:, :, :1].float() @ seen.key.float().transpose(-1, -2)
    weights: Tensor = (logits * seen.query.shape[-1] ** -0.5).softmax(-1)
    return weights[:, :, 0, 1:].mean(1)
