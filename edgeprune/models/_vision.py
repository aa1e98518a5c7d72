"""Pixels to visual tokens: encoder, pruning before the decoder, projector, fixed tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune.errors import SpecError
from edgeprune.models._encoder import EncoderConfig
from edgeprune.models._encoder_site import SiteConfig
from edgeprune.models._layers import ACTIVATIONS, LayerNorm, Linear
from edgeprune.models._layout import Layout
from edgeprune.models._ops import TorchOps, cast
from edgeprune.models._qwen_tower import TowerConfig
from edgeprune.models._sites import live_stage
from edgeprune.models._vision_tower import Encoded, PolicyMerge, Tower
from edgeprune.policies import Policy
from edgeprune.policies._select import ranked
from edgeprune.policies._signals import InputSignals, VisionSignals
from edgeprune.spec import Plan


class ProjectorLike(Protocol):
    """A description of a projector, of any structure."""

    @property
    def output(self) -> int:
        """Width of the decoder."""
        ...

    def build(self, ops: TorchOps) -> nn.Module:
        """Module: features [1, n, inputs] -> tokens [1, n, output] in the dtype of its weights."""
        ...


@dataclass(frozen=True, slots=True)
class ProjectorConfig:
    """Two linear layers from the encoder's width to the decoder's."""

    inputs: int
    output: int
    activation: str
    bias: bool = True
    norm: bool = False  # a layer norm before the first
    hidden: int | None = None  # between the two; None: as output
    eps: float = 1e-5  # of the norm

    def build(self, ops: TorchOps) -> Projector:
        return Projector(self, ops)


@dataclass(frozen=True, slots=True)
class VisionConfig:
    encoder: EncoderConfig | TowerConfig
    projector: ProjectorLike
    layout: Layout
    deepstack: tuple[ProjectorLike, ...] = ()  # of the middle blocks that are read
    site: SiteConfig | None = None  # where patches leave the encoder

    @property
    def after_encoder(self) -> int:
        """Visual tokens that are left where patches leave for good; 0: they all are."""
        if self.site is None or self.site.method.rejoins:
            return 0
        return self.layout.tiles * self.site.kept_units + len(self.layout.fixed)


class Projector(nn.Module):
    def __init__(self, config: ProjectorConfig, ops: TorchOps) -> None:
        super().__init__()
        self.config = config
        self.norm = LayerNorm(config.inputs, config.eps, ops) if config.norm else nn.Identity()
        hidden = config.hidden or config.output
        self.first = Linear(config.inputs, hidden, ops, config.bias)
        self.second = Linear(hidden, config.output, ops, config.bias)

    def forward(self, features: Tensor) -> Tensor:
        activation = ACTIVATIONS[self.config.activation]
        projected: Tensor = self.second(activation(self.first(self.norm(features))))
        return cast(projected, self.second.weight.dtype)


class FixedTokens(nn.Module):
    """Puts tokens that are no tile's between those of the tiles; none of them is dropped here.

    They are the model's newline, [CLS] where it is read too, and text between images. Text has
    zeros in the `beside` columns that tiles' tokens have beside their own.
    """

    def __init__(self, layout: Layout, width: int, beside: int = 0) -> None:
        super().__init__()
        self.layout, self.beside = layout, beside
        self.newline = nn.Parameter(torch.empty(width)) if layout.newline else None
        text = len(layout.text)
        self.text = nn.Parameter(torch.empty(text, width)) if text else None

    def forward(
        self, visual: Tensor, indices: Tensor, merged: int, cls: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Survivors [1, n, width] of the C tile tokens -> with fixed ones, indices among V.

        Kept and fixed tokens in reading order, a kept [CLS] (C among C, V among V) after them, then
        the `merged` tokens. `cls` [1, tiles, width] is projected.
        """
        layout, kept, fixed = self.layout, indices.shape[0] - merged, self._fixed(cls)
        fixed_size = isinstance(kept, int)  # or symbolic, where counts are an input
        if merged == 0 and fixed_size and kept == len(layout.from_tiles):
            return self._whole(visual, fixed)
        own = indices.new_tensor([*layout.from_tiles, layout.visual_tokens]).index_select(
            0, indices
        )
        first = torch.cat([own[:kept], indices.new_tensor(layout.fixed)])
        order = ranked(-first.float(), first.shape[0])  # several kept [CLS] share an index
        ordered = torch.cat([visual[:, :kept], fixed], dim=1).index_select(1, order)
        own = torch.cat([first.index_select(0, order), own[kept:]])
        return torch.cat([ordered, visual[:, kept:]], dim=1), own

    def _fixed(self, cls: Tensor | None) -> Tensor:
        """The fixed tokens in reading order: [1, V - C, width]."""
        parts = [] if self.newline is None else [self.newline[None, None]]
        parts += [] if cls is None else [cls]
        parts += [] if self.text is None else [F.pad(self.text[None], (0, self.beside))]
        which = [-1 - source for source in self.layout.order if source < 0]
        bank = torch.cat(parts, dim=1)
        return bank.index_select(1, torch.tensor(which, device=bank.device))

    def _whole(self, visual: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor]:
        """The same where no token was dropped: the order is known."""
        count, indices = visual.shape[1], torch.arange(self.layout.visual_tokens)
        own, others = iter(range(count)), iter(range(count, len(indices)))
        order = [next(own if source >= 0 else others) for source in self.layout.order]
        whole = torch.cat([visual, fixed], dim=1)
        return whole.index_select(1, torch.tensor(order, device=visual.device)), indices


class Vision(nn.Module):
    """The vision graph: what a policy drops before the decoder is dropped here."""

    def __init__(
        self, config: VisionConfig, policy: Policy, plan: Plan, ops: TorchOps | None = None
    ) -> None:
        super().__init__()
        self.config, self.policy, self.plan = config, policy, plan
        ops = ops or TorchOps()
        if config.site is not None and self.merge_in_encoder is not None:
            raise SpecError(
                f"--encoder {config.site.method} needs a method that leaves the encoder's blocks as"
                " they are; choose one that prunes behind them, such as visionzip"
            )
        self.encoder: Tower = config.encoder.build(ops, config.site)
        self.projector = config.projector.build(ops)
        if config.deepstack:
            self.deepstack = nn.ModuleList(part.build(ops) for part in config.deepstack)
        layout = config.layout
        width = config.projector.output
        self.fixed = (
            FixedTokens(layout, width, len(config.deepstack) * width) if layout.fixed else None
        )

    def forward(
        self, pixels: Tensor, counts: Tensor | None = None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Pixels [tiles, 3, H, W] -> visual tokens [1, r_1, output], their indices int64 [r_1], and
        the encoder's hidden states before each block and after the last.

        With DeepStack each token's rows of the middle blocks stand beside it, [1, r_1, (1 + n) *
        output]: they go where the token goes, and are averaged where it is. A stage's count
        includes the fixed tokens, which cannot be scored here and stay. `counts` int64 [layers] is
        r_1 ... r_L in place of the plan's.
        """
        seen: Encoded = self.encoder(pixels, self.merge_in_encoder)
        return (*self.select(seen, counts), seen.states)

    @property
    def merge_in_encoder(self) -> PolicyMerge | None:
        """What merges tokens in the encoder's blocks, if anything does."""
        stages = self.plan.behind_encoder()
        if not stages or stages[0].site != "block":
            return None
        return partial(self.policy.merge_in_block, stage=stages[0])

    @property
    def counted(self) -> bool:
        """Whether counts decide what is kept here, where they are an input."""
        return self.plan.dialed and bool(self.plan.behind_encoder())

    def select(self, seen: Encoded, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """From what the encoder gives to visual tokens and their indices."""
        stages, layout = self.plan.behind_encoder(), self.config.layout
        fixed, entered = len(layout.fixed), self.config.after_encoder or layout.visual_tokens
        if stages and stages[0].site == "block":
            assert seen.indices is not None
            features, kept, merged = seen.features, seen.indices, stages[0].merged
            middle: tuple[Tensor, ...] = ()
        else:
            signals = self.signals(seen)
            features, middle, merged = signals.features, signals.middle, 0
            kept = torch.arange(features.shape[1], device=features.device)
            if seen.units is not None:
                kept = layout.left_indices(seen.units)
        for stage in (s for s in stages if s.site == "vision"):
            stage = live_stage(stage, entered, counts) if counts is not None else stage
            chosen = self.policy.vision(signals, replace(stage, keep=stage.keep - fixed))
            features, merged = chosen.gather(features), stage.merged
            kept = self._chosen_of(kept, chosen.indices, seen)
            middle = tuple(map(chosen.gather, middle))
        visual = features if layout.late else self.projector(features)
        if middle:
            rows = (part(own) for part, own in zip(self.deepstack, middle, strict=True))
            visual = torch.cat([visual, *rows], dim=-1)
        if self.fixed is not None:
            cls = self.projector(signals.cls_features()) if layout.cls else None
            visual, kept = self.fixed(visual, kept, merged, cls)
        for stage in (s for s in stages if s.site == "input"):
            tokens = visual[..., : self.config.projector.output] if middle else visual
            chosen = self.policy.input(InputSignals(tokens, visual.shape[1]), stage, stage)
            visual, kept = chosen.gather(visual), kept.index_select(0, chosen.indices)
        return visual, kept

    def signals(self, seen: Encoded) -> VisionSignals:
        """The output of the last block that is run, and what a policy may look at in it.

        Where patches are resized after the projector, the features are projected.
        """
        layout = self.config.layout
        if seen.units is not None:
            return self._signals_left(seen, seen.units.shape[1])
        features = layout.tokens(self.projector(seen.features) if layout.late else seen.features)
        grid = (1, features.shape[1]) if layout.fixed else layout.grid
        return VisionSignals(
            features,
            seen.query,
            seen.key,
            grid,
            seen.cls,
            layout.mean,
            cls_stays=layout.cls,
            tile_of=layout.tile_of,
            middle=tuple(map(layout.tokens, seen.middle)),
            resampled=seen.resampled,
            shown=layout.shown_patches(features.device),
        )

    def _signals_left(self, seen: Encoded, count: int) -> VisionSignals:
        """The same of the `count` tokens that are left of each tile, tile after tile."""
        layout = self.config.layout
        features = layout.left_tokens(seen.features)
        tiles = range(layout.tiles if layout.tiles > 1 else 0)
        return VisionSignals(
            features,
            seen.query,
            seen.key,
            (1, features.shape[1]),
            seen.cls,
            layout.left_means,
            cls_stays=layout.cls,
            tile_of=tuple(tile for tile in tiles for _ in range(count)),
            middle=tuple(map(layout.left_tokens, seen.middle)),
        )

    def _chosen_of(self, alive: Tensor, chosen: Tensor, seen: Encoded) -> Tensor:
        """Indices among the C tile tokens of those chosen of the n alive; n of these, and C of
        those, stands for [CLS]."""
        if seen.units is None:
            return chosen  # all C were alive
        cls = torch.tensor([len(self.config.layout.from_tiles)], device=alive.device)
        return torch.cat([alive, cls]).index_select(0, chosen)

    def entry_scores(self, seen: Encoded) -> Tensor | None:
        """The salience of each visual token that the encoder gives, in reading order, above all
        others at the fixed tokens: [V], or fewer; None where no block of the encoder sees all
        patches."""
        signals, layout = self.signals(seen), self.config.layout
        if not signals.sees_attention:
            return None
        scores = signals.salience()
        if seen.units is None:
            return layout.among_all(scores, other=2.0)
        left = torch.tensor(layout.from_tiles, device=scores.device)
        left = left.index_select(0, layout.left_indices(seen.units))
        fixed = torch.tensor(layout.fixed, dtype=left.dtype, device=left.device)
        order = torch.cat([left, fixed]).argsort()
        return torch.cat([scores, scores.new_full(fixed.shape, 2.0)]).index_select(0, order)
