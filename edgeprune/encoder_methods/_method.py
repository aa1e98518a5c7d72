"""What every method that shortens the vision encoder has: where, how many, and by what."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Self

from torch import Tensor

from edgeprune.encoder_methods._choices import CHOICES, SiteSignals
from edgeprune.errors import SpecError

AUTO = "auto"
EACH, JOINT = "each", "joint"
"""Windows of which each keeps the same share of its units, or whose units all compete."""


@dataclass(frozen=True)
class EncoderMethod:
    """Base of all; never built itself. Before block `at`, a share `keep` of the patches goes on.

    Patches that the model merges into one visual token are one unit: they go on, or leave,
    together. Every tile, image or span of frames has the same share, and where a tower attends
    within windows every window, unless these are chosen from together.
    """

    at: int = 0  # the block before which patches leave, counted from 0
    keep: float = 0.5  # share of the units that go on
    by: str = AUTO  # what chooses them; auto: pixels before block 0, else salient where the encoder
    # has a [CLS], contrast where it has none
    step: int = 8  # units that are chosen at a time, at most, where the choice is greedy
    limit: float = 0.13  # largest mean angle, in radians, between the decoder's last features with
    # the shortened encoder and with all of it; an export above it is refused
    windows: str = EACH  # where attention is within windows: each keeps the same share, or joint: a
    # share of all, wherever they are, and a mask says what is in one window

    summary: ClassVar[str] = ""
    rejoins: ClassVar[bool]
    """Whether units that leave come back at the end, so that the decoder sees all V tokens."""

    def __post_init__(self) -> None:
        if self.at < 0 or self.step < 1:
            raise SpecError(f"--encoder {self}: at is 0 or more, step 1 or more")
        if not (math.isfinite(self.keep) and 0 < self.keep < 1):
            raise SpecError(
                f"--encoder {self}: keep is the share of patches that go on, above 0 and below 1"
            )
        if self.windows not in (EACH, JOINT):
            raise SpecError(f"--encoder {self}: windows is {EACH} or {JOINT}; got {self.windows!r}")
        if self.by not in (AUTO, *CHOICES):
            raise SpecError(
                f"--encoder {self}: by is one of {', '.join((AUTO, *CHOICES))}; got {self.by!r}"
            )

    @property
    def name(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    def __str__(self) -> str:
        """As --encoder takes it, options at their defaults left out but for `at` and `keep`."""
        shown = [f"at={self.at}", f"keep={self.keep:g}"]
        for field in fields(self)[2:]:
            if (value := getattr(self, field.name)) != field.default:
                shown.append(f"{field.name}={value}")
        return ":".join([self.name, *shown])

    @property
    def choosing(self) -> str:
        """What decides how long choosing takes, beside the number that is kept; `by` is settled."""
        parts = [self.name, f"by={self.by}"]
        defaults = {field.name: field.default for field in fields(self)}
        for name in ("step", "windows"):
            if (value := getattr(self, name)) != defaults[name]:
                parts.append(f"{name}={value}")
        return ":".join(parts)

    def kept(self, units: int) -> int:
        """How many of so many units go on."""
        return max(1, round(self.keep * units))

    def settled(self, blocks: int, cls: bool) -> Self:
        """The method with `by` decided for a tower of so many blocks; SpecError where the tower has
        not what it looks at."""
        if self.at >= blocks:
            raise SpecError(
                f"--encoder {self}: at is from 0 to {blocks - 1}, blocks of this model's encoder"
            )
        if self.by == AUTO:
            best = "pixels" if self.at == 0 else "salient" if cls else "contrast"
            return replace(self, by=best)
        if CHOICES[self.by].cls and not cls:
            raise SpecError(
                f"--encoder {self}: by={self.by} looks at [CLS], which this model's encoder has"
                " not; choose by=contrast or by=diverse"
            )
        if CHOICES[self.by].cls and self.at == 0:
            raise SpecError(
                f"--encoder {self}: by={self.by} looks at a block that has been run; choose at=1 or"
                " more, or by=pixels"
            )
        return self

    def choose(self, signals: SiteSignals) -> Tensor:
        """Which units go on: float32 [groups, n], 1 at `kept(n)` of each group, else 0."""
        return CHOICES[self.by].mask(signals, self.kept(signals.count), self.step)
