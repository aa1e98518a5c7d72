"""The encoder for frames of a fixed camera: of a frame only K patches that changed go through it.

Each block keeps the keys and values of all tokens of a frame. Of the next frame K patches, and
[CLS], go through the blocks. They attend to the keys and values of all patches: their own anew, the
others' as they were. A patch that is not encoded keeps its features, though in the whole encoder
it would see what changed: so this is an approximation. K is fixed, so every size is.

After Eventful Transformers (Dutson, Li, Gupta, ICCV 2023, arXiv:2308.13494), which decide before
every product what changed; here the pixels decide once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edgeprune.errors import SpecError
from edgeprune.models._encoder import Encoded, Encoder, EncoderConfig, Encoding
from edgeprune.models._vision import VisionConfig

Cache = tuple[Tensor, Tensor]
"""Keys and values of a block for all tokens of a frame: [1, heads, S, head] each."""


def changed_patches(config: VisionConfig, tiles: int, share: float) -> int:
    """K, for a share of a frame's patches; SpecError where an encoder has no such form."""
    if not 0 < share < 1:
        raise SpecError(f"--delta is a share of a frame's patches, between 0 and 1; got {share:g}")
    if why := why_whole(config, tiles):
        raise SpecError(f"--delta: {why}; leave it out")
    encoder = config.encoder
    assert isinstance(encoder, EncoderConfig)
    patches = encoder.side**2
    return min(max(1, round(share * patches)), patches - 1)


def why_whole(config: VisionConfig, tiles: int) -> str:
    """Why a model's frames are encoded as a whole; empty where they need not be."""
    encoder = config.encoder
    if not isinstance(encoder, EncoderConfig):
        return "this vision tower has windows, groups of patches or rotary positions"
    if type(encoder) is not EncoderConfig:
        return "this vision tower resamples its patches or their positions"
    if encoder.joined:
        return "this model reads hidden states of several blocks of its vision tower"
    if config.site is not None:
        return f"--encoder {config.site.method} chooses other patches in every frame"
    if tiles != 1:
        return f"it is for one image of one tile, this bundle takes {tiles} tiles or frames"
    return ""


def changed_operations(encoder: EncoderConfig, patches: int) -> int:
    """Operations of the encoder for so many patches of a frame."""
    width, new = encoder.width, patches + encoder.cls
    whole = encoder.side**2 + encoder.cls
    block = 2 * new * width * (4 * width + encoder.products * encoder.mlp_width)
    block += 4 * new * whole * width
    return 2 * patches * encoder.inputs * width + encoder.blocks * block


@dataclass(frozen=True)
class Frame:
    """A frame between two blocks: n of its S tokens, [CLS] first, are encoded, and all N patches
    are known from the frame before. Of a whole frame n is S."""

    hidden: Tensor  # [1, n, width]
    sources: Tensor | None = None  # int64 [N], row of each patch among those encoded and, behind
    # them, those known; None: all are encoded
    tokens: Tensor | None = None  # int64 [S], likewise of each token
    query: Tensor | None = None  # [1, heads, n, head], of the last block so far
    key: Tensor | None = None  # [1, heads, S, head], likewise
    value: Tensor | None = None  # [1, heads, S, head]

    @property
    def cache(self) -> Cache:
        """Of the last block so far."""
        assert self.key is not None and self.value is not None
        return self.key, self.value


@dataclass(frozen=True)
class Known:
    """What is known of the frame before, behind the last block."""

    features: Tensor  # [1, N, width]
    query: Tensor | None  # [1, heads, S, head]; None: it is not asked for


class FrameEncoder:
    """Runs an encoder's blocks on a whole frame, or on K patches of one."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.first = encoder, int(encoder.cls is not None)

    def enter(self, pixels: Tensor) -> Frame:
        """A whole frame: pixels [1, 3, H, W]."""
        return Frame(self.encoder.enter(pixels).hidden)

    def enter_changed(self, patches: Tensor, indices: Tensor, sources: Tensor) -> Frame:
        """Pixels [K, 3, patch, patch] of the patches `indices` int64 [K]; `sources` as in Frame."""
        encoder, positions, tokens = self.encoder, self.encoder.positions(), sources
        embedded = encoder.patch(patches).flatten(1)[None]
        x = embedded + positions.index_select(0, indices + self.first)
        if encoder.cls is not None:
            x = torch.cat([(encoder.cls + positions[0])[None, None], x], dim=1)
            tokens = torch.cat([torch.zeros_like(sources[:1]), sources + 1])
        return Frame(encoder.pre_norm(x), sources, tokens)

    def advance(self, number: int, frame: Frame, cache: Cache | None = None) -> Frame:
        """A block; `cache` is its own of the frame before, unless all tokens are encoded."""
        held = list[Cache]()

        def attended(key: Tensor, value: Tensor) -> Cache:
            if cache is not None:
                key, value = (
                    self._placed(key, cache[0], frame),
                    self._placed(value, cache[1], frame),
                )
            held.append((key, value))
            return key, value

        block = self.encoder.blocks[number]
        hidden, query, key, _ = block(frame.hidden, None, lambda key: None, attended)
        return replace(frame, hidden=hidden, query=query, key=key, value=held[0][1])

    def leave(self, frame: Frame, known: Known | None = None) -> Encoded:
        """What a tile gives, of all patches; `known` unless all tokens are encoded."""
        encoder, first = self.encoder, self.first
        assert frame.query is not None and frame.key is not None  # behind the last block
        if known is None or frame.sources is None:
            return encoder.leave(Encoding(frame.hidden, frame.query, frame.key))
        x = encoder.post_norm(frame.hidden)
        features = torch.cat([x[:, first:], known.features], dim=1).index_select(1, frame.sources)
        query = None if known.query is None else self._placed(frame.query, known.query, frame)
        return Encoded(features, x[:, :1] if first else None, query, frame.key)

    def _placed(self, new: Tensor, known: Tensor, frame: Frame) -> Tensor:
        """Rows of all tokens, the encoded ones in place of those known: [1, heads, n, head],
        [1, heads, S, head] -> [1, heads, S, head]."""
        assert frame.tokens is not None
        return torch.cat([new, known[:, :, self.first :]], dim=2).index_select(2, frame.tokens)
