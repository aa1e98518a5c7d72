"""Where the encoder is shortened: before one block some units of patches leave the sequence.

A unit is the patches that become one visual token, or a single patch where tokens are resized or
averaged later. Sizes are fixed: every tile keeps the same number, and every window of one shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from edgeprune.encoder_methods import EncoderMethod
from edgeprune.encoder_methods._choices import CHOICES, SiteSignals, contrast
from edgeprune.encoder_methods._method import JOINT
from edgeprune.models._layers import Part, WithBuffers, common
from edgeprune.models._ops import TorchOps, cast

Runs = tuple[tuple[int, int], ...]  # (windows, what is in each), all of a run of one shape


@dataclass(frozen=True)
class Units:
    """The patches of a tile as units, in the order in which windows have them."""

    runs: Runs  # windows and the units of each; one window where attention is full
    members: tuple[tuple[int, ...], ...]  # of each unit its patches' indices in the sequence
    tokens: tuple[int, ...]  # of each unit its index among a tile's tokens, row by row
    grid: tuple[int, int]  # rows, columns of the units of a tile

    @classmethod
    def of(cls, order: Sequence[int], grid: tuple[int, int], side: int, runs: Runs) -> Units:
        """Squares of `side` x `side` patches. `order` names the patch at each index of the
        sequence, of a grid of (rows, columns) patches; `runs` are its windows in patches."""
        columns, area = grid[1], side * side
        members: dict[int, list[int]] = {}
        for index, patch in enumerate(order):
            row, column = divmod(patch, columns)
            members.setdefault(row // side * (columns // side) + column // side, []).append(index)
        return cls(
            tuple((windows, patches // area) for windows, patches in runs),
            tuple(map(tuple, members.values())),
            tuple(members),
            (grid[0] // side, columns // side),
        )

    @property
    def count(self) -> int:
        """Units of a tile."""
        return len(self.members)

    @property
    def area(self) -> int:
        """Patches of a unit."""
        return len(self.members[0])

    @property
    def windows(self) -> tuple[int, ...]:
        """The window of each unit."""
        sizes = [size for windows, size in self.runs for _ in range(windows)]
        return tuple(number for number, size in enumerate(sizes) for _ in range(size))

    @cached_property
    def patches(self) -> tuple[int, ...]:
        """The sequence's index of each patch, unit by unit."""
        return tuple(index for unit in self.members for index in unit)

    @cached_property
    def places(self) -> tuple[tuple[int, int], ...]:
        """Of each index of the sequence its unit, and which of the unit's patches it is."""
        found = {
            index: (unit, slot)
            for unit, patches in enumerate(self.members)
            for slot, index in enumerate(patches)
        }
        return tuple(found[index] for index in range(len(found)))


@dataclass(frozen=True, eq=False)
class ExitMap:
    """From a state before a block to what the dense encoder says in the end, for each state read.

    Fitted in calibration; float32."""

    weight: Tensor  # [width, states * width]
    bias: Tensor  # [states * width]


@dataclass(frozen=True)
class SiteLoss:
    """What a site does to a model, on calibration samples."""

    samples: int
    r2: float | None  # of an exit's map, on images that it was not fitted on
    angle: float  # radians, mean: between the decoder's last features with the site and without


@dataclass(frozen=True, eq=False)
class SiteConfig:
    """A method of the encoder with all sizes."""

    method: EncoderMethod
    units: Units
    exit_map: ExitMap | None = None  # None: not fitted yet, or nothing rejoins
    loss: SiteLoss | None = None  # None: not measured

    @property
    def at(self) -> int:
        return self.method.at

    @property
    def within_limit(self) -> bool:
        """Whether it was measured to lose no more than its method allows."""
        return self.loss is not None and self.loss.angle <= self.method.limit

    @property
    def masked(self) -> bool:
        """Whether units of all windows compete, so that windows have different numbers of them."""
        return self.method.windows == JOINT

    @property
    def groups(self) -> Runs:
        """What units compete in, as (groups, units of each)."""
        return ((1, self.units.count),) if self.masked else self.units.runs

    @cached_property
    def kept(self) -> Runs:
        """Groups and how many units of each go on."""
        return tuple((groups, self.method.kept(units)) for groups, units in self.groups)

    @property
    def kept_units(self) -> int:
        """Units of a tile that go on."""
        return sum(windows * units for windows, units in self.kept)

    @property
    def kept_runs(self) -> Runs:
        """The same as windows and patches of each."""
        return tuple((windows, units * self.units.area) for windows, units in self.kept)


@dataclass(frozen=True)
class Split:
    """Which units went on at a site, which left, and what an exit gives of these."""

    chosen: Tensor  # int64 [tiles, K], units that went on, in the order of their states
    removed: Tensor  # int64 [tiles, U - K], the others
    removed_states: Tensor  # [tiles, (U - K) * area, width], of the others
    mapped: tuple[Tensor, ...] = ()  # each [tiles, (U - K) * area, width], for each state read


class Map(Part, WithBuffers):
    """The fitted product of an exit."""

    def __init__(self, fitted: ExitMap, ops: TorchOps) -> None:
        super().__init__()
        self.fitted, self.ops = fitted, ops
        self.register_buffer("weight", torch.empty(0), persistent=False)
        self.register_buffer("bias", torch.empty(0), persistent=False)
        self.weight: Tensor
        self.bias: Tensor

    def compute_buffers(self, dtype: torch.dtype) -> None:
        self.weight, self.bias = (x.to(dtype) for x in (self.fitted.weight, self.fitted.bias))

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.float32 if self.wide else self.weight.dtype
        weight, bias = cast(self.weight, dtype), cast(self.bias, dtype)
        return self.ops.linear(cast(x, dtype), weight, bias)


class EncoderSite(nn.Module):
    """Chooses units before a block, separates them from the others, and joins both again."""

    def __init__(self, config: SiteConfig, ops: TorchOps) -> None:
        super().__init__()
        self.config = config
        self.map = Map(config.exit_map, ops) if config.exit_map is not None else None

    @property
    def drops(self) -> bool:
        """Whether what leaves never comes back."""
        return not self.config.method.rejoins

    @property
    def looks_at_pixels(self) -> bool:
        return CHOICES[self.config.method.by].pixels

    @property
    def looks_at_cls(self) -> bool:
        return CHOICES[self.config.method.by].cls

    def contrast(self, pixels: Tensor, patch: int) -> Tensor:
        """How far each unit's colours are from the usual, in the units' order: float32 [tiles, U].

        `patch` is pixels a side of one."""
        units = self.config.units
        side = patch * round(units.area**0.5)
        values = contrast(pixels, *units.grid, side)
        return _chosen(values, units.tokens, 1)

    def split(
        self, patches: Tensor, contrast: Tensor | None = None, attention: Tensor | None = None
    ) -> tuple[Tensor, Split]:
        """[tiles, P, width] -> what goes on, [tiles, K * area, width] unit by unit, and the rest.

        `contrast` [tiles, U] is of units, `attention` [tiles, P] of patches.
        """
        units, (tiles, _, width) = self.config.units, patches.shape
        grouped = self._grouped(patches)  # [tiles, U, area, width]
        means = grouped.float().mean(2) if units.area > 1 else grouped[:, :, 0]
        given = None if attention is None else self._grouped(attention[..., None]).mean((2, 3))
        chosen, removed, start = list[Tensor](), list[Tensor](), 0
        for (windows, size), (_, keep) in zip(self.config.groups, self.config.kept, strict=True):
            end = start + windows * size

            def groups(x: Tensor, start: int = start, end: int = end, size: int = size) -> Tensor:
                part = x if end - start == x.shape[1] else x[:, start:end]
                return part.reshape(-1, size, *part.shape[2:])

            signals = SiteSignals(
                groups(means),
                None if contrast is None else groups(contrast),
                None if given is None else groups(given),
            )
            parted = _parted(self.config.method.choose(signals))
            firsts = start + size * torch.arange(windows, device=parted.device)
            parted = parted.view(tiles, windows, size) + firsts[:, None]
            chosen.append(parted[:, :, :keep].flatten(1))
            removed.append(parted[:, :, keep:].flatten(1))
            start = end
        on, off = (x[0] if len(x) == 1 else torch.cat(x, 1) for x in (chosen, removed))
        flat = grouped.flatten(2)  # [tiles, U, area * width]
        kept = taken(flat, on).reshape(tiles, -1, width)
        left = taken(flat, off).reshape(tiles, -1, width)
        mapped = () if self.map is None else tuple(self.map(left).split(width, dim=-1))
        return kept, Split(on, off, left, mapped)

    def rejoin(self, kept: Tensor, split: Split, state: int) -> Tensor:
        """All patches as the sequence had them: [tiles, K * area, width] -> [tiles, P, width].

        `state` says which of the hidden states that are read it is."""
        units = self.config.units
        order = _ascending(torch.cat([split.chosen, split.removed], 1))  # [tiles, U]: where each is
        unit, slot = (torch.tensor(x, device=order.device) for x in zip(*units.places, strict=True))
        indices = order.index_select(1, unit) * units.area + slot
        return taken(torch.cat(common(False, kept, split.mapped[state]), 1), indices)

    def of_chosen(self, x: Tensor, split: Split) -> Tensor:
        """Another state of all patches as what went on has it: [tiles, P, width] ->
        [tiles, K * area, width]."""
        return taken(self._grouped(x).flatten(2), split.chosen).reshape(x.shape[0], -1, x.shape[2])

    def kept_tokens(self, split: Split) -> tuple[Tensor, Tensor | None]:
        """Which of a tile's tokens went on, rising: int64 [tiles, K]; and, where their states
        stand in another order, the rows that put these into it: int64 [tiles, K * area]."""
        units = self.config.units
        if list(units.tokens) == list(range(units.count)):
            return split.chosen, None
        tokens = torch.tensor(units.tokens, device=split.chosen.device)
        tokens = tokens.index_select(0, split.chosen.flatten()).view(split.chosen.shape)
        rising = torch.topk(tokens, tokens.shape[1], dim=-1, largest=False)
        slots = torch.arange(units.area, device=tokens.device)
        return rising.values, (rising.indices[:, :, None] * units.area + slots).flatten(1)

    def mask(self, split: Split) -> Tensor:
        """Which patches that went on are in one window: bool [tiles, 1, K * area, K * area]."""
        numbers = torch.tensor(self.config.units.windows, device=split.chosen.device)
        own = numbers.index_select(0, split.chosen.flatten()).view(split.chosen.shape)
        own = own.repeat_interleave(self.config.units.area, dim=1)
        return (own[:, :, None] == own[:, None, :])[:, None]

    def rows(self, units: Tensor) -> Tensor:
        """The sequence's index of each patch of units: int64 [tiles, k] -> [tiles, k * area]."""
        members = torch.tensor(self.config.units.members, device=units.device)
        return members.index_select(0, units.flatten()).view(units.shape[0], -1)

    def _grouped(self, x: Tensor) -> Tensor:
        """[tiles, P, width] -> [tiles, U, area, width]."""
        units = self.config.units
        return _chosen(x, units.patches, 1).view(x.shape[0], units.count, units.area, x.shape[2])


def _parted(mask: Tensor) -> Tensor:
    """Of each row first the marked places, then the others, both rising: int64 [groups, n].

    Every key is different, so that engines have no ties to break."""
    count = mask.shape[1]
    places = torch.arange(count, device=mask.device).float()
    return torch.topk(mask * (2 * count) - places, count, dim=-1).indices


def _ascending(indices: Tensor) -> Tensor:
    """Where each of 0 .. n - 1 stands in a row: int64 [tiles, n] -> [tiles, n]."""
    return torch.topk(indices, indices.shape[1], dim=-1, largest=False).indices


def taken(x: Tensor, indices: Tensor) -> Tensor:
    """Rows of each tile by its own indices, in one gather: [tiles, n, width], [tiles, k] ->
    [tiles, k, width]; of several heads [tiles, heads, n, head] -> [tiles, heads, k, head]."""
    if x.dim() == 4:
        beside = taken(x.transpose(1, 2).flatten(2), indices)  # heads side by side
        return beside.view(*beside.shape[:2], x.shape[1], x.shape[3]).transpose(1, 2)
    tiles, count, width = x.shape
    if tiles == 1:
        return x.index_select(1, indices[0])
    firsts = torch.arange(tiles, device=x.device)[:, None] * count
    flat = x.reshape(tiles * count, width).index_select(0, (indices + firsts).flatten())
    return flat.view(tiles, -1, width)


def _chosen(x: Tensor, order: Sequence[int], dim: int) -> Tensor:
    """Along an axis in a fixed order; nothing is traced where it is that already."""
    if list(order) == list(range(x.shape[dim])):
        return x
    return x.index_select(dim, torch.tensor(order, device=x.device))
