"""The vision transformer of the Qwen-VL families, for images of any size.

A patch spans two frames, a still image being both. Queries and keys turn by the patch's row and
column. Qwen2-VL has LayerNorms, a plain MLP and full attention in all blocks. Qwen3-VL adds a
learned grid of positions, resampled to the image, and its middle blocks are read too. Pixtral has
RMS norms, gated MLPs, a norm before the blocks and no biases, GLM-4V that and a grid. Qwen2.5-VL
has RMS norms, a gated MLP, and attention within windows in most blocks. For a frozen size the
windows are known, so patches are put in their order once, by one gather, and back at the end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from edgeprune.models._encoder_site import EncoderSite, Runs, SiteConfig, Split, Units, taken
from edgeprune.models._layers import WithBuffers
from edgeprune.models._ops import TorchOps
from edgeprune.models._permutation import inverse
from edgeprune.models._position_grid import PositionGrid
from edgeprune.models._qwen_block import Block, norm
from edgeprune.models._vision_tower import Attended, Encoded, Encoding, PolicyMerge, Tower
from edgeprune.models._windows import Windows

EPS = 1e-6
"""Of the norms of Qwen's towers; no config says otherwise."""


@dataclass(frozen=True)
class TowerConfig:
    """Sizes of the transformer, and the frozen size of an image."""

    blocks: int
    width: int
    mlp_width: int
    heads: int
    patch: int  # pixels a side
    frames: int  # that a patch spans
    rows: int  # of patches
    columns: int
    activation: str
    theta: float = 10000.0
    gated: bool = False  # RMS norms and gated MLPs
    bias: bool = True  # of the products of a block
    eps: float = EPS  # of the norms
    pre_norm: bool = False  # a norm before the blocks
    post_norm: bool = True  # a norm over each patch behind them
    post_eps: float | None = None  # of that norm; None: `eps`
    mixed: bool = False  # of the frequencies of a head rows have every other, columns the rest
    window: int = 0  # patches a side of a window; 0: full attention in every block
    full: tuple[int, ...] = ()  # blocks with full attention all the same
    cls: bool = False
    still: bool = True  # each image stands for all frames of a patch; else they come one by one
    patch_bias: bool = False
    position_side: int = 0  # of the square grid of learned positions; 0: there is none
    cubic: bool = False  # that grid is resampled by cubic convolution, not linearly
    middle: tuple[int, ...] = ()  # blocks whose output is read beside the last one's

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        return self.rows * self.patch, self.columns * self.patch

    @property
    def merging_blocks(self) -> int:
        """Blocks that may merge tokens."""
        return 0

    @property
    def left_out(self) -> int:
        """Blocks of the tower that are not run."""
        return 0

    @property
    def patches(self) -> int:
        return self.rows * self.columns

    @cached_property
    def all_windows(self) -> Windows:
        return Windows.of((self.rows, self.columns), self.window or max(self.rows, self.columns))

    @property
    def spans(self) -> int:
        """Images or frames that are encoded as one."""
        return 1 if self.still else self.frames

    @property
    def products(self) -> int:
        """Of the MLP of a block."""
        return 3 if self.gated else 2

    @property
    def inputs(self) -> int:
        """Numbers of a patch."""
        return 3 * self.frames * self.patch**2

    def attends_within(self, block: int) -> bool:
        """Whether a block attends within windows."""
        return bool(self.window) and block not in self.full

    def windows(self, block: int, site: SiteConfig | None = None) -> Runs:
        """What attends to itself alone in a block, as (windows, patches of each); under a mask all
        patches are one run, as they are computed."""
        left = site is not None and block >= site.at
        windows = site.kept_runs if site and left else self.all_windows.runs
        if self.attends_within(block):
            return windows
        return ((1, sum(n * size for n, size in windows)),)

    def looks_everywhere(self, blocks: int) -> int:
        """The last of the first blocks with full attention, which policies look at; -1: none."""
        found = (b for b in range(blocks) if self.windows(b) == ((1, self.patches),))
        return max(found, default=-1)

    def units(self, side: int) -> Units:
        """The patches of an image as squares of `side` x `side`."""
        windows = self.all_windows
        return Units.of(windows.order, (self.rows, self.columns), side, windows.runs)

    def states_after(self, at: int) -> int:
        """Hidden states that are read after block `at` has begun."""
        return 1 + sum(block >= at for block in self.middle)

    def build(self, ops: TorchOps, site: SiteConfig | None = None) -> QwenTower:
        return QwenTower(self, ops, site)


class QwenTower(Tower, WithBuffers):
    """Pixels [frames, 3, H, W] to normed features, and queries and keys, in reading order."""

    def __init__(self, config: TowerConfig, ops: TorchOps, site: SiteConfig | None = None) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.site = EncoderSite(site, ops) if site else None
        blocks = site.at if site is not None and site.method.rejoins else config.blocks
        self.looked_at = (config.looks_everywhere(blocks),)
        self.patch = nn.Conv2d(
            3 * config.frames, config.width, config.patch, config.patch, bias=config.patch_bias
        )
        if config.position_side:
            self.position = PositionGrid(config)
        self.blocks = nn.ModuleList(
            Block(config, config.windows(block, site), ops) for block in range(config.blocks)
        )
        self.pre_norm = norm(config, ops) if config.pre_norm else nn.Identity()
        # the merger's, over each patch
        eps = config.eps if config.post_eps is None else config.post_eps
        self.post_norm = norm(config, ops, eps) if config.post_norm else nn.Identity()
        self.register_buffer("cos", torch.empty(0), persistent=False)
        self.register_buffer("sin", torch.empty(0), persistent=False)
        self.cos: Tensor
        self.sin: Tensor

    def compute_buffers(self, dtype: torch.dtype) -> None:
        """Angles of each patch, half by its row, half by its column, as `order` has them."""
        config = self.config
        pairs = config.width // config.heads // 4  # of a head, that turn by the row
        exponents = torch.arange(0, 2 * pairs, 2, dtype=torch.int64).float() / (2 * pairs)
        by_axis = torch.stack([exponents, exponents + config.mixed / (2 * pairs)])
        indices = torch.tensor(config.all_windows.order)
        axes = torch.stack([indices // config.columns, indices % config.columns], dim=1).float()
        angles = (axes[..., None] * (1.0 / config.theta**by_axis)).flatten(1)  # [N, head / 2]
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)

    @property
    def order(self) -> tuple[int, ...] | None:
        order = self.config.all_windows.order
        return None if list(order) == list(range(self.config.patches)) else order

    def enter(self, pixels: Tensor) -> Encoding:
        x = self.pre_norm(self.patch(self._spans(pixels)).flatten(2).transpose(1, 2))
        if self.config.position_side:
            x = self.position(x)
        if self.order is not None:
            x = x.index_select(1, torch.tensor(self.order))
        return Encoding(x, contrast=self.contrast(pixels, self.site))

    def enter_some(self, patches: Tensor, indices: Tensor) -> Encoding:
        x = self.pre_norm(self.patch(self._spans(patches)).flatten(1)[None])
        if self.config.position_side:
            x = self.position(x, indices)
        return Encoding(x, some=indices)

    def contrast(self, pixels: Tensor, site: EncoderSite | None) -> Tensor | None:
        if site is None or not site.looks_at_pixels:
            return None
        return site.contrast(self._spans(pixels), self.config.patch)

    def run_block(
        self,
        number: int,
        seen: Encoding,
        policy: PolicyMerge | None,
        attended: Attended | None = None,
    ) -> Encoding:
        left, window = None, None
        if seen.split is not None and self.site is not None:
            left = self.site.rows(seen.split.chosen)
            if self.site.config.masked and self.config.attends_within(number):
                window = self.site.mask(seen.split)
        tables, block = (self.cos, self.sin), self.blocks[number]
        assert isinstance(block, Block)  # ModuleList forgets what it holds
        if seen.some is None:
            x, query, key = block(seen.hidden, *tables, left, window, attended)
        else:
            assert attended is not None  # they attend to more than themselves
            rows, window = self._of_some(number, seen.some)
            x, query, key = block.of_some(seen.hidden, rows, *tables, window, attended)
        if number not in self.looked_at:
            query, key = seen.query, seen.key
        seen = replace(seen, hidden=x, query=query, key=key)
        if number not in self.config.middle:
            return seen
        joined = seen.joined + (seen.split is not None)
        return replace(seen, read=(*seen.read, self.whole(x, seen)), joined=joined)

    def _of_some(self, number: int, patches: Tensor) -> tuple[Tensor, Tensor | None]:
        """For patches int64 [n] in reading order the rows of the rotary tables int64 [1, n], and
        where a block attends within windows which patches each sees: bool [1, 1, n, N]."""
        rows, windows = patches, self.config.all_windows
        if self.order is not None:
            rows = torch.tensor(inverse(windows.order), device=rows.device).index_select(0, rows)
        if not self.config.attends_within(number) or windows.numbers[-1] == 0:
            return rows[None], None
        numbers = torch.tensor(windows.numbers, device=rows.device)
        own = numbers.index_select(0, rows)
        return rows[None], (own[:, None] == numbers)[None, None]

    def alone(self, number: int, hidden: Tensor, rows: Tensor) -> Tensor:
        found: Tensor = self.blocks[number](hidden, self.cos, self.sin, rows)[0]
        return found

    def states(self, seen: Encoding, at: int) -> tuple[Tensor, ...]:
        middle = zip(self.config.middle, seen.read, strict=True)
        return *(x for block, x in middle if block >= at), self.post_norm(seen.hidden)

    def leave(self, seen: Encoding) -> Encoded:
        x, query, key = self.whole(self.post_norm(seen.hidden), seen), seen.query, seen.key
        middle = seen.read
        if seen.split is not None and self.site is not None and self.site.drops:
            return self._left(x, seen, seen.split, self.site)
        if self.order is not None:
            back = torch.tensor(inverse(self.config.all_windows.order))
            key = None if key is None else key.index_select(-2, back)
            if seen.some is None:
                x = x.index_select(-2, back)
                query = None if query is None else query.index_select(-2, back)
                middle = tuple(t.index_select(-2, back) for t in middle)
        return Encoded(x, None, query, key, middle=middle)

    def _left(self, x: Tensor, seen: Encoding, split: Split, site: EncoderSite) -> Encoded:
        """As `leave`, where patches left for good."""
        units, rows = site.kept_tokens(split)

        def ordered(values: Tensor) -> Tensor:
            return values if rows is None else taken(values, rows)

        query, key = (None if t is None else ordered(t) for t in (seen.query, seen.key))
        middle = tuple(map(ordered, seen.read))
        return Encoded(ordered(x), None, query, key, units=units, middle=middle)

    def _spans(self, pixels: Tensor) -> Tensor:
        """Frames beside each other within each colour: [n, 3, H, W] -> [spans, 3 frames, H, W]."""
        frames = self.config.frames
        if self.config.still:
            return pixels[:, :, None].expand(-1, -1, frames, -1, -1).flatten(1, 2)
        spans = pixels.view(-1, frames, *pixels.shape[1:])
        return spans.transpose(1, 2).flatten(1, 2)
