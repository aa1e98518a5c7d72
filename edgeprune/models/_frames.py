"""The encoder for frames of a fixed camera: of a frame only K patches that changed go through it.

Each block keeps the keys and values of all tokens of a frame. Of the next frame K patches, and
[CLS], go through the blocks. They attend to the keys and values of all patches, or within windows
to those of their own window: their own anew, the others' as they were. A patch that is not encoded
keeps its features, though in the whole encoder it would see what changed: so this is an
approximation. K is fixed, so every size is.

After Eventful Transformers (Dutson, Li, Gupta, ICCV 2023, arXiv:2308.13494), which decide before
every product what changed; here the pixels decide once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edgeprune.errors import SpecError
from edgeprune.models._encoder import EncoderConfig
from edgeprune.models._permutation import inverse
from edgeprune.models._qwen_tower import TowerConfig
from edgeprune.models._siglip2 import Siglip2Config
from edgeprune.models._vision import Vision, VisionConfig
from edgeprune.models._vision_tower import Encoded, Encoding, Tower

KeyValue = tuple[Tensor, Tensor]
"""Keys and values of a block for all tokens of a frame: [1, heads, S, head] each, patches in the
order of the tower's sequence."""


@dataclass(frozen=True)
class ChangedConfig:
    """How many patches of a frame of which few changed are encoded."""

    patches: int  # K
    unit: int  # patches a side of those that become one visual token, and are encoded together


def changed_config(config: VisionConfig, share: float, *, video: bool = False) -> ChangedConfig:
    """For a share of a frame's patches; SpecError where an encoder has no such form. `video`: tiles
    are frames of one video."""
    if not 0 < share < 1:
        raise SpecError(f"--delta is a share of a frame's patches, between 0 and 1; got {share:g}")
    if why := _why_whole(config, video):
        raise SpecError(f"--delta: {why}; leave it out")
    layout = config.layout
    unit = layout.merge if layout.pool == "join" else 1  # averaged or resized ones are many
    area = unit * unit
    units = config.encoder.patches // area
    if units < 2:
        raise SpecError("--delta: a frame of this model is a single visual token; leave it out")
    return ChangedConfig(area * min(max(1, round(share * units)), units - 1), unit)


def _why_whole(config: VisionConfig, video: bool) -> str:
    """Why a model's frames are encoded as a whole; empty where they need not be."""
    if video:
        return "it is for images of fixed cameras, this bundle takes a video"
    if type(config.encoder) not in (EncoderConfig, Siglip2Config, TowerConfig):
        return "each token of this vision tower is made of all patches"
    if config.site is not None:
        return f"--encoder {config.site.method} chooses other patches in every frame"
    if config.layout.shown:
        return "the view of the whole image has fewer patches than a tile"
    return ""


def changed_operations(encoder: EncoderConfig | TowerConfig, patches: int) -> int:
    """Operations of the encoder for so many patches of a tile. Under a mask, as where blocks have
    windows, all products are computed."""
    first = int(encoder.cls)
    width, new, whole = encoder.width, patches + first, encoder.patches + first
    block = 2 * new * width * (4 * width + encoder.products * encoder.mlp_width)
    block += 4 * new * whole * width
    return 2 * patches * encoder.inputs * width + encoder.blocks * block


@dataclass(frozen=True)
class Changed:
    """Where what is encoded anew stands among what is known of a tile."""

    patches: Tensor  # int64 [1, K, 2], indices in [1, N, width], in reading order
    tokens: Tensor  # int64 [1, heads, n, 3], in [1, heads, S, head] of queries: with [CLS] first
    slots: Tensor  # int64 [1, heads, n, 3], of keys and values: in the order of the sequence


@dataclass(frozen=True)
class Frame:
    """A tile between two blocks: n of its S tokens are encoded; of a whole one n is S."""

    seen: Encoding  # of the n tokens; keys are of all
    changed: Changed | None = None  # None: all are encoded
    cache: KeyValue | None = None  # of the last block so far, of all tokens; None: none yet

    @property
    def hidden(self) -> Tensor:
        """[1, n, width]"""
        return self.seen.hidden


@dataclass(frozen=True)
class Known:
    """What is known of all patches of the frame before, behind the last block."""

    features: Tensor  # [1, N, width]
    query: Tensor | None = None  # [1, heads, S, head]; None: it is not asked for
    middle: Tensor | None = None  # [1, N, blocks * width], likewise

    @classmethod
    def of(cls, seen: Encoded) -> Known:
        """Of a frame that left the encoder."""
        signals = seen.signals
        return cls(signals["features"], signals.get("query"), signals.get("middle"))


class FrameEncoder:
    """Runs a tower's blocks on a whole tile, or on K patches of one."""

    def __init__(self, tower: Tower, heads: int) -> None:
        self.tower, self.heads = tower, heads

    def enter(self, pixels: Tensor) -> Frame:
        """A whole tile: pixels [1, 3, H, W]."""
        return Frame(self.tower.enter(pixels))

    def enter_changed(self, patches: Tensor, indices: Tensor) -> Frame:
        """Pixels [K, 3, patch, patch] of the patches `indices` int64 [K] in reading order."""
        tower, tokens = self.tower, indices
        if tower.first:
            tokens = torch.cat([torch.zeros_like(indices[:1]), indices + tower.first])
        slots = tokens
        if tower.order is not None:  # such towers have no [CLS]
            back = inverse(tower.order)
            slots = torch.tensor(back, device=indices.device).index_select(0, indices)
        by_head = self._by_head(tokens)
        changed = Changed(
            torch.stack([torch.zeros_like(indices), indices], dim=-1)[None],
            by_head,
            by_head if slots is tokens else self._by_head(slots),
        )
        return Frame(tower.enter_some(patches, indices), changed)

    def advance(self, number: int, frame: Frame, cache: KeyValue | None = None) -> Frame:
        """A block; `cache` is its own of the frame before, unless all tokens are encoded."""
        held = list[KeyValue]()

        def attended(key: Tensor, value: Tensor) -> KeyValue:
            if cache is not None and (changed := frame.changed) is not None:
                key, value = (
                    self.tower.ops.scatter(known, changed.slots, new)
                    for new, known in zip((key, value), cache, strict=True)
                )
            held.append((key, value))
            return key, value

        seen = self.tower.run_block(number, frame.seen, None, attended)
        return replace(frame, seen=seen, cache=_of_all(held))

    def leave(self, frame: Frame, known: Known | None = None) -> Encoded:
        """What a tile gives, of all patches; `known` unless all tokens are encoded."""
        seen, changed = self.tower.leave(frame.seen), frame.changed
        if known is None or changed is None:
            return seen
        query, middle, scatter = None, tuple[Tensor, ...](), self.tower.ops.scatter
        if known.query is not None and seen.query is not None:
            query = scatter(known.query, changed.tokens, seen.query)
        if known.middle is not None:
            new = torch.cat(seen.middle, dim=-1)
            placed = scatter(known.middle, changed.patches, new)
            middle = placed.chunk(len(seen.middle), dim=-1)
        features = scatter(known.features, changed.patches, seen.features)
        return replace(seen, features=features, query=query, middle=middle)

    def _by_head(self, rows: Tensor) -> Tensor:
        """Of rows int64 [n] the indices in [1, heads, S, head]: [1, heads, n, 3]."""
        shape = 1, self.heads, rows.shape[0]
        heads = torch.arange(self.heads, device=rows.device)[None, :, None]
        rows = rows[None, None].expand(shape)
        return torch.stack([torch.zeros_like(rows), heads.expand(shape), rows], dim=-1)


def frame_encoder(vision: Vision) -> FrameEncoder:
    """Of an eager model."""
    return FrameEncoder(vision.encoder, vision.config.encoder.heads)


def _of_all(held: Sequence[KeyValue]) -> KeyValue:
    """Keys and values of a block as one sequence, where its windows have their own."""
    key, value = (
        [x if x.shape[0] == 1 else x.transpose(0, 1).flatten(1, 2)[None] for x in parts]
        for parts in zip(*held, strict=True)
    )
    if len(key) == 1:
        return key[0], value[0]
    return torch.cat(key, dim=2), torch.cat(value, dim=2)
