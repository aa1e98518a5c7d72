"""Pixels to visual tokens: encoder, pruning before the decoder, projector, separators."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from edgeprune.models._encoder import ACTIVATIONS, EncoderConfig
from edgeprune.models._layers import Linear
from edgeprune.models._layout import SEPARATOR, Layout
from edgeprune.models._ops import TorchOps
from edgeprune.models._qwen_tower import TowerConfig
from edgeprune.policies import Policy
from edgeprune.policies._signals import InputSignals, VisionSignals
from edgeprune.spec import Plan, Stage


@dataclass(frozen=True, slots=True)
class ProjectorConfig:
    """Two linear layers from the encoder's width to the decoder's."""

    inputs: int
    output: int
    activation: str
    bias: bool = True
    norm: bool = False  # a layer norm before the first
    hidden: int | None = None  # between the two; None: as output


@dataclass(frozen=True, slots=True)
class VisionConfig:
    encoder: EncoderConfig | TowerConfig
    projector: ProjectorConfig
    layout: Layout


class Projector(nn.Module):
    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(config.inputs) if config.norm else nn.Identity()
        hidden = config.hidden or config.output
        self.first = Linear(config.inputs, hidden, config.bias)
        self.second = Linear(hidden, config.output, config.bias)

    def forward(self, features: Tensor) -> Tensor:
        activation = ACTIVATIONS[self.config.activation]
        projected: Tensor = self.second(activation(self.first(self.norm(features))))
        return projected


class Separators(nn.Module):
    """Puts the model's own tokens back between those of the tiles; none of them is dropped."""

    def __init__(self, layout: Layout, width: int) -> None:
        super().__init__()
        self.layout = layout
        self.newline = nn.Parameter(torch.empty(width))

    def forward(self, visual: Tensor, at: Tensor, merged: int) -> tuple[Tensor, Tensor]:
        """Survivors [1, n, width] of the C tile tokens -> with separators, positions among V.

        Kept tokens and separators in reading order, [CLS] (C among C, V among V) after them, then
        the `merged` tokens.
        """
        layout, kept = self.layout, at.shape[0] - merged
        if merged == 0 and kept == len(layout.from_tiles):
            return self._whole(visual)
        own = at.new_tensor([*layout.from_tiles, layout.visual_tokens]).index_select(0, at)
        places = torch.cat([own[:kept], at.new_tensor(layout.separators)])
        places, order = places.topk(places.shape[0], largest=False)
        newlines = self.newline.expand(1, len(layout.separators), -1)
        ordered = torch.cat([visual[:, :kept], newlines], dim=1).index_select(1, order)
        return torch.cat([ordered, visual[:, kept:]], dim=1), torch.cat([places, own[kept:]])

    def _whole(self, visual: Tensor) -> tuple[Tensor, Tensor]:
        """The same where no token was dropped: the order is known."""
        count, places = visual.shape[1], torch.arange(self.layout.visual_tokens)
        own, separators = iter(range(count)), iter(range(count, len(places)))
        order = [next(separators if o == SEPARATOR else own) for o in self.layout.order]
        newlines = self.newline.expand(1, len(places) - count, -1)
        whole = torch.cat([visual, newlines], dim=1)
        return whole.index_select(1, torch.tensor(order, device=visual.device)), places


class Vision(nn.Module):
    """The vision graph: what a policy drops before the decoder is dropped here."""

    def __init__(
        self, config: VisionConfig, policy: Policy, plan: Plan, ops: TorchOps | None = None
    ) -> None:
        super().__init__()
        self.config, self.policy, self.plan = config, policy, plan
        self.encoder = config.encoder.build(ops or TorchOps())
        self.projector = Projector(config.projector)
        separated = config.layout.separators
        width = config.projector.output
        self.separators = Separators(config.layout, width) if separated else None

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [tiles, 3, H, W] -> visual tokens [1, r_1, output], their positions int64 [r_1].

        A stage's count includes the separators, which have no features to score and stay.
        """
        stages, fixed = self.plan.before_decoder(), len(self.config.layout.separators)
        if stages and stages[0].site == "block":
            features, kept, merged = self._folded(pixels, stages[0])
        else:
            signals = self.encode(pixels)
            features, merged = signals.features, 0
            kept = torch.arange(features.shape[1], device=features.device)
        for stage in (s for s in stages if s.site == "vision"):
            chosen = self.policy.vision(signals, replace(stage, keep=stage.keep - fixed))
            features, kept, merged = chosen.of(features), chosen.at, stage.merged
        visual = self.projector(features)
        if self.separators is not None:
            visual, kept = self.separators(visual, kept, merged)
        for stage in (s for s in stages if s.site == "input"):
            chosen = self.policy.input(InputSignals(visual, visual.shape[1]), stage, stage)
            visual, kept = chosen.of(visual), kept.index_select(0, chosen.at)
        return visual, kept

    def _folded(self, pixels: Tensor, stage: Stage) -> tuple[Tensor, Tensor, int]:
        """What is left by an encoder that merges: [1, merged, width], places, how many merged."""
        seen = self.encoder(pixels, partial(self.policy.fold, stage=stage))
        return seen.features, seen.at, stage.merged

    def encode(self, pixels: Tensor) -> VisionSignals:
        """The output of the last block that is run, and what a policy may look at in it."""
        seen, layout = self.encoder(pixels), self.config.layout
        features = layout.join(seen.features)
        grid = (1, features.shape[1]) if layout.separators else layout.grid
        return VisionSignals(features, seen.query, seen.key, grid, seen.cls, layout.mean)
