"""Time to first token as a budget: the encoder's menu and the decoder's counts under one profile.

With encoder e and counts r a first token takes

    read + preprocess + vision(e) + sum_l P(r_l) / L + sum of the sites

and is expected to lose delta(e) + D(r): delta is the angle by which the shortened encoder turns
the dense decoder's output; D is the schedule's loss, with the angle of r_1 where fewer tokens enter
layer 1 than the encoder gives. All are in radians on calibration samples. Angles obey the triangle
inequality, so the sum bounds what they do together. Entries of the menu are compared by the
dense encoder's evidence; the best gets a calibration of its own, and where that is worse than the
next is said to be, the next too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import ClassVar

import numpy as np

from edgeprune import cost
from edgeprune.calib.solvers._problem import Floats, Ints, Problem
from edgeprune.calib.solvers.grouped import decisions_of, groups_of
from edgeprune.calib.solvers.timed import Times, frontier
from edgeprune.encoder_methods import EncoderMethod, load
from edgeprune.errors import SpecError
from edgeprune.models import Adapter
from edgeprune.models._encoder_operations import encoder_operations
from edgeprune.models._encoder_site import SiteConfig
from edgeprune.policies import Policy
from edgeprune.timing import KindTimes, Profile, Table

PER_LAYER = 512
"""Units of time that a decoder layer takes with all visual tokens."""
DEPTHS = 0.0, 0.25, 0.5
KEEPS = 0.35, 0.5, 0.7
NAMES = "exit", "drop"
"""The menu where none is given: blocks as shares of the depth, shares that go on, and whether the
others come back."""


@dataclass(frozen=True)
class Costs(ABC):
    """What of one model can be chosen, and what each choice spends of a budget."""

    adapter: Adapter
    option: ClassVar[str]  # that asks for the budget
    name: ClassVar[str]  # of its unit

    @property
    @abstractmethod
    def before(self) -> float:
        """Of what no choice changes."""

    @abstractmethod
    def vision(self, site: SiteConfig | None) -> float:
        """Of the vision graph."""

    @abstractmethod
    def layer(self, number: int, count: float) -> float:
        """Of a decoder layer (1-based) that so many visual tokens enter."""

    def site(self, number: int, count: int) -> float:
        """Of choosing behind a layer (1-based) that so many visual tokens have left."""
        return 0.0

    @property
    def groups(self) -> list[range]:
        """Layers (1-based) that have one count: it falls only behind layers with attention."""
        shape = self.adapter.shape
        ends = np.cumsum([0, *groups_of(shape.layers, shape.convolutions)]).tolist()
        return [range(start + 1, end + 1) for start, end in pairwise(ends)]

    @cached_property
    def unit(self) -> float:
        """What a unit of `times` is."""
        shape = self.adapter.shape
        layers = self.prefill((shape.visual_tokens,) * shape.layers)
        return layers / shape.layers / PER_LAYER

    def times(self, *, floor: bool = False) -> Times:
        """What groups of decoder layers and the sites behind them spend, rounded up; with `floor`
        down, for bounds."""

        def whole(exact: Floats) -> Ints:
            shares = exact / self.unit
            rounded = np.floor(shares + 1e-9) if floor else np.ceil(shares - 1e-9)
            return rounded.astype(np.intp)

        return Times(*map(whole, self._exact))

    @cached_property
    def _exact(self) -> tuple[Floats, Floats]:
        """Of groups of layers [G, V + 1] and the sites behind them [G - 1, V + 1]."""
        shape = self.adapter.shape
        counts, kinds = range(shape.visual_tokens + 1), dict[str, Floats]()
        for number in range(1, shape.layers + 1):
            if (kind := cost.layer_kind(shape, number)) not in kinds:
                kinds[kind] = np.array([self.layer(number, count) for count in counts])
        groups, every = self.groups, range(1, shape.layers + 1)
        each = np.array([kinds[cost.layer_kind(shape, number)] for number in every])
        units = np.add.reduceat(each, [group[0] - 1 for group in groups])
        falls = [[self.site(group[-1], count) for count in counts] for group in groups[:-1]]
        return units, np.reshape(np.array(falls, np.float64), (-1, len(counts)))

    def prefill(self, counts: Sequence[float]) -> float:
        """Of r_1 ... r_L, with the sites where they fall."""
        layers = sum(self.layer(number, count) for number, count in enumerate(counts, 1))
        falls = (n for n, (count, behind) in enumerate(pairwise(counts), 1) if behind < count)
        return layers + sum(self.site(n, int(counts[n - 1])) for n in falls)


@dataclass(frozen=True)
class Operations(Costs):
    """Billions of operations, for a prompt of `text` text tokens."""

    text: int = 64
    option: ClassVar[str] = "--cr"
    name: ClassVar[str] = "billion operations"

    @property
    def before(self) -> float:
        """The output head."""
        return cost.prefill_operations(self.adapter.shape, (), self.text) / 1e9

    def vision(self, site: SiteConfig | None) -> float:
        encoder, pixels = self.adapter.vision_config.encoder, self.adapter.pixels
        tiles = pixels[0] // encoder.spans
        patches = pixels[2] // encoder.patch * (pixels[3] // encoder.patch)
        return tiles * encoder_operations(encoder, patches, site) / 1e9

    def layer(self, number: int, count: float) -> float:
        low = int(count)
        one, more = (
            cost.layer_operations(self.adapter.shape, number, entered, self.text) / 1e9
            for entered in (low, low + 1)
        )
        return one + (count - low) * (more - one)

    def of_ratio(self, cr: float) -> float:
        """Of the dense encoder and a decoder whose every layer V / CR visual tokens enter."""
        shape = self.adapter.shape
        counts = (shape.visual_tokens / cr,) * shape.layers
        return self.before + self.vision(None) + self.prefill(counts)


@dataclass(frozen=True)
class Measured(Costs):
    """Milliseconds by a profile."""

    profile: Profile
    policy: Policy  # that chooses in the decoder
    option: ClassVar[str] = "--ttft"
    name: ClassVar[str] = "ms"

    @property
    def before(self) -> float:
        """Of what comes before the encoder."""
        return self.profile.read.ms + self.profile.preprocess.ms

    def vision(self, site: SiteConfig | None) -> float:
        """The vision graph as measured, less what its blocks save, and choosing patches; an exit's
        map by its share of the operations."""
        encoder, whole = self.adapter.vision_config.encoder, self.profile.vision.ms
        blocks = range(encoder.blocks)
        dense = sum(self._block(encoder.windows(block)) for block in blocks)
        ours = sum(self._block(encoder.windows(block, site)) for block in blocks)
        scale = min(1.0, whole / dense)  # a block by itself may be slower than in its graph
        return whole - scale * (dense - ours) + whole * self._map(site) + self._choosing(site)

    def layer(self, number: int, count: float) -> float:
        """Its share of a prefill in which so many enter every layer."""
        shape, whole = self.adapter.shape, self.profile.prefill.at(count)
        if not self.profile.layers:
            return whole / shape.layers
        own = {times.kind: times.table.at(count) for times in self.profile.layers}
        every = [own[cost.layer_kind(shape, n)] for n in range(1, shape.layers + 1)]
        return whole * every[number - 1] / sum(every)

    def site(self, number: int, count: int) -> float:
        kind = self.policy.scoring(number)
        return _table(self.profile.sites, kind, "choosing in the decoder by").at(count)

    def _choosing(self, site: SiteConfig | None) -> float:
        """An encoder site."""
        if site is None:
            return 0.0
        table = _table(self.profile.choices, site.method.choosing, "--encoder")
        return table.at(site.kept_units)

    def _block(self, windows: Sequence[tuple[int, int]]) -> float:
        """Of a block whose tokens attend within windows, given as in `cost.block_operations`."""
        (number, size), table = windows[0], self.profile.windowed
        if number == 1 or table is None:
            return self.profile.block.at(sum(n * s for n, s in windows))
        return table.at(size) * sum(n * s for n, s in windows) / (number * size)

    def _map(self, site: SiteConfig | None) -> float:
        """An exit's map, as a share of the dense encoder."""
        if site is None or not site.method.rejoins:
            return 0.0
        encoder = self.adapter.vision_config.encoder
        left = (site.units.count - site.kept_units) * site.units.area
        operations = 2 * left * encoder.width**2 * encoder.states_after(site.at)
        return operations / encoder_operations(encoder, site.units.count * site.units.area)


def _table(times: Sequence[KindTimes], kind: str, what: str) -> Table:
    """Of one kind; SpecError where a profile has none."""
    found = {one.kind: one.table for one in times}
    if kind not in found:
        known = "; ".join(found) or "none"
        raise SpecError(
            f"the profile has no times of {what} {kind}; it has {known}. Choose one of these, or"
            " give --cr in place of --ttft"
        )
    return found[kind]


def open_costs(adapter: Adapter, profile: Profile, policy: Policy) -> Measured:
    """SpecError where a profile is of another model."""
    shape, encoder, tiles = adapter.shape, adapter.vision_config.encoder, adapter.pixels[0]
    patches = adapter.pixels[2] // encoder.patch * (adapter.pixels[3] // encoder.patch)
    ours = {
        "family": shape.family,
        "layers": shape.layers,
        "width": shape.width,
        "mlp_width": shape.mlp_width,
        "visual_tokens": shape.visual_tokens,
        "blocks": encoder.blocks,
        "patches": patches,
        "tiles": tiles // encoder.spans,
    }
    for name, value in ours.items():
        if (timed := getattr(profile.model, name)) != value:
            raise SpecError(
                f"the profile is of another model or image size: its {name} is {timed}, this"
                f" model's {value}; profile a dense bundle of this one"
            )
    kinds = {cost.layer_kind(shape, number) for number in range(1, shape.layers + 1)}
    if len(kinds) > 1:
        for kind in sorted(kinds):
            _table(profile.layers, kind, "decoder layers with")
    return Measured(adapter, profile, policy)


def menu(adapter: Adapter) -> list[EncoderMethod]:
    """Exits and drops at some depths with some shares, those that the model can have."""
    blocks = adapter.vision_config.encoder.blocks
    depths = dict.fromkeys(round(depth * blocks) for depth in DEPTHS)
    named = [load(name) for name in NAMES]
    if adapter.vision_config.layout.why_whole:
        named = [method for method in named if method.rejoins]
    return [method(at=at, keep=keep) for method in named for at in depths for keep in KEEPS]


@dataclass(frozen=True)
class Point:
    """A way to a first token: what it spends, in the costs' unit, what it loses, and how."""

    spent: float  # in all
    loss: float  # radians; without the encoder's own where that was not measured
    site: SiteConfig | None  # None: the dense encoder
    vision: float  # of what it spends
    prefill: float
    counts: tuple[int, ...]
    cr: float

    @property
    def encoder(self) -> str:
        return "dense" if self.site is None else str(self.site.method)


Curve = Sequence[tuple[int, float, Ints]]
"""Schedules of which none is both faster and better than another: units of time, radians, and the
counts of the groups of layers."""


def curve(costs: Costs, problem: Problem) -> Curve:
    """The schedules of a problem; the fastest of all is one."""
    shape, times = costs.adapter.shape, costs.times()
    own = problem.falling_at(decisions_of(shape.layers, shape.convolutions))
    least = times.fastest(problem.first if problem.least is None else problem.least)
    entered = least if problem.least is None else np.append(problem.first, least)
    first = int(times.of(least[None])[0]), float(own.evaluate(entered[None])[0]), least
    return [first, *frontier(own, times)]


def points(costs: Costs, site: SiteConfig | None, schedules: Curve) -> list[Point]:
    """An encoder, None for the dense one, with each of the schedules behind it."""
    angle = 0.0 if site is None or site.loss is None else site.loss.angle
    vision = costs.vision(site)
    return [_point(costs, site, vision, one, angle) for one in schedules]


def fastest(costs: Costs, site: SiteConfig | None, enter: int) -> Point:
    """The least that is spent with an encoder where so many tokens or more enter layer 1; its loss
    is not known, and stands as 0."""
    times = costs.times()
    counts = times.fastest(enter)
    return _point(costs, site, costs.vision(site), (int(times.of(counts[None])[0]), 0.0, counts), 0)


def _point(
    costs: Costs,
    site: SiteConfig | None,
    vision: float,
    schedule: tuple[int, float, Ints],
    angle: float,
) -> Point:
    """The decoder's time is rounded up to units, as the budget of a schedule is counted."""
    units, loss, counts = schedule
    shape, prefill = costs.adapter.shape, units * costs.unit
    listed = tuple(np.repeat(counts, [len(group) for group in costs.groups]).tolist())
    cr = shape.visual_tokens * shape.layers / sum(listed)
    return Point(costs.before + vision + prefill, angle + loss, site, vision, prefill, listed, cr)


def undominated(found: Sequence[Point]) -> list[Point]:
    """Those of which none is both faster and better than another, the fastest first."""
    best, kept = np.inf, list[Point]()
    for one in sorted(found, key=lambda point: (point.spent, point.loss)):
        if one.loss < best - 1e-9:
            best = one.loss
            kept.append(one)
    return kept


def spare(costs: Costs, asked: float, site: SiteConfig | None) -> int:
    """Units of time that are left for the decoder's layers."""
    return int((asked - costs.before - costs.vision(site)) / costs.unit + 1e-9)
