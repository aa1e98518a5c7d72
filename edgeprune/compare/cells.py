"""What is compared: methods with their options, ratios, and seeds where a method draws."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from edgeprune import policies
from edgeprune.compare.titles import DENSE, FLOAT, titled
from edgeprune.errors import SpecError
from edgeprune.spec import PruneSpec
from edgeprune.weight_format import WeightFormat


@dataclass(frozen=True)
class Cell:
    """One bundle of the comparison."""

    method: str
    cr: float
    seed: int = 0
    options: tuple[tuple[str, str], ...] = ()
    weights: str = FLOAT  # as --weights of export takes it
    tiles: int | None = None  # as --tiles of export takes it; None: all

    @property
    def label(self) -> str:
        """The method and what is not its default, as `utp ure=off`."""
        return " ".join([self.method, *(f"{name}={value}" for name, value in self.options)])

    @property
    def title(self) -> str:
        """The label with the weights, where these are quantised, and the tiles, where not all are
        encoded."""
        return titled(self.label, self.weights, self.tiles)

    @property
    def name(self) -> str:
        """For files: `utp-ure=off-int4-cr4`, with the seed where there are several."""
        seed = f"-seed{self.seed}" if self.seed else ""
        return re.sub(r"[^\w.=-]", "_", f"{self.title.replace(' ', '-')}-cr{self.cr:g}{seed}")

    @property
    def spec(self) -> PruneSpec:
        return PruneSpec(self.method, self.cr, self.seed, dict(self.options))


def grid(
    methods: Sequence[str],
    ratios: Sequence[float],
    seeds: int,
    weights: Sequence[str] = (FLOAT,),
    tiles: Sequence[int | None] = (None,),
) -> list[Cell]:
    """The dense model, then every method at every ratio, and all of this in every format of
    `weights` and with every number of `tiles`; SpecError where a name or value is wrong.

    A method is a name, or a name with options such as `utp:ure=off:position=start`; `all` is every
    method there is. One that draws is there `seeds` times, one whose counts are given at no ratio
    but its own.
    """
    if seeds < 1:
        raise SpecError(f"--seeds is at least 1; got {seeds}")
    named = [name for text in methods for name in (policies.names() if text == "all" else [text])]
    cells = [Cell(DENSE, 1.0)]
    for cr in dict.fromkeys(map(float, ratios)):
        for text in dict.fromkeys(named):
            method, options = _parsed(text)
            if method != DENSE:
                seeded = _draws(method) and "seed" not in dict(options)
                own = 1.0 if PruneSpec(method, options=dict(options)).exact else cr
                cells += [Cell(method, own, n, options) for n in range(seeds if seeded else 1)]
    cells = list(dict.fromkeys(cells))
    for cell in cells:
        policies.make(cell.spec)  # a wrong option is refused now, not after an hour
    formats = dict.fromkeys(text.strip() for text in weights)
    for text in formats:
        WeightFormat.parse(text)
    numbers = dict.fromkeys(tiles)
    return [
        replace(cell, weights=text, tiles=number)
        for text in formats
        for number in numbers
        for cell in cells
    ]


def _parsed(text: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    method, *settings = text.strip().split(":")
    pairs = [setting.partition("=") for setting in settings]
    if any(not (name and equals) for name, equals, _ in pairs):
        raise SpecError(f"a method's options are written METHOD:NAME=VALUE; got {text!r}")
    return method, tuple((name, value) for name, _, value in pairs)


def _draws(method: str) -> bool:
    return "seed" in {field.name for field in fields(policies.load(method))}
