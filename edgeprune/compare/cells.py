"""What is compared: methods with their options, ratios, and seeds where a method draws."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

from edgeprune import policies
from edgeprune.errors import SpecError
from edgeprune.spec import PruneSpec

DENSE = "none"


@dataclass(frozen=True)
class Cell:
    """One bundle of the comparison."""

    method: str
    cr: float
    seed: int = 0
    options: tuple[tuple[str, str], ...] = ()

    @property
    def label(self) -> str:
        """The method and what is not its default, as `utp ure=off`."""
        return " ".join([self.method, *(f"{name}={value}" for name, value in self.options)])

    @property
    def name(self) -> str:
        """For files: `utp-ure=off-cr4`, with the seed where there are several."""
        seed = f"-seed{self.seed}" if self.seed else ""
        return re.sub(r"[^\w.=-]", "_", f"{self.label.replace(' ', '-')}-cr{self.cr:g}{seed}")

    @property
    def spec(self) -> PruneSpec:
        return PruneSpec(self.method, self.cr, self.seed, dict(self.options))


def grid(methods: Sequence[str], ratios: Sequence[float], seeds: int) -> list[Cell]:
    """The dense model, then every method at every ratio; SpecError where a name or value is wrong.

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
        policies.make(cell.spec)  # a wrong option is told now, not after an hour
    return cells


def _parsed(text: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    method, *settings = text.strip().split(":")
    pairs = [setting.partition("=") for setting in settings]
    if any(not (name and equals) for name, equals, _ in pairs):
        raise SpecError(f"a method's options are written METHOD:NAME=VALUE; got {text!r}")
    return method, tuple((name, value) for name, _, value in pairs)


def _draws(method: str) -> bool:
    return "seed" in {field.name for field in fields(policies.load(method))}
