"""The best encoders within one budget, measured only where that can change which they are.

What an encoder and a schedule spend is known without measuring. What they lose is at least

- what the decoder's schedule loses within what the encoder leaves of the budget, by the dense
  encoder's evidence; 0 before the tokens that a drop leaves are known;
- and what a gentler encoder loses that was measured: one that lets the same kind of patches go, by
  the same choice, before the same block or a later one, and keeps as many or more. That an encoder
  loses no less than a gentler one is no theorem. It holds in all 64 pairs of
  benchmarks/results/encoder-accuracy.json, and not on random weights. Where a measurement
  contradicts it, it is not used from then on; where none does, a better encoder may be missed.

The encoder with the least of these bounds is looked at first. Of those gentler than it that may be
the best too, the gentlest is measured before: its loss bounds the others'.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from edgeprune.calib.survey import Survey
from edgeprune.calib.ttft import Point
from edgeprune.errors import SpecError


@dataclass
class _Candidate:
    """An encoder that fits, and what is known of it."""

    point: Point  # the best within the budget; at first the fastest, without a loss
    least: float = 0.0  # radians that the encoder by itself loses at least
    solved: bool = False  # the decoder's loss is known
    measured: bool = False  # the encoder's too

    @property
    def bound(self) -> float:
        """Radians that it loses at least, or exactly where it was measured."""
        return self.point.loss + (0.0 if self.measured else self.least)

    def gentler(self, other: _Candidate) -> bool:
        """Whether it is taken to lose no more than another."""
        ours, theirs = self.point.site, other.point.site
        if ours is None or theirs is None:
            return False
        one, two = ours.method, theirs.method
        alike = one == replace(two, at=one.at, keep=one.keep)
        return alike and one.at >= two.at and one.keep >= two.keep


class BestFirst:
    """The encoders of a survey within a budget, the best first."""

    def __init__(self, survey: Survey, asked: float) -> None:
        """SpecError where the fastest of all takes more than `asked`."""
        costs, every = survey.costs, [survey.fastest(site) for site in (None, *survey.sites)]
        first = min(every, key=lambda point: point.spent)
        if first.spent > asked:
            raise SpecError(
                f"{costs.option}: {asked:.4g} {costs.name} are out of reach: the least that is"
                f" predicted is {first.spent:.4g} (encoder {first.encoder}, CR {first.cr:.1f}); ask"
                " for that or more, or use a smaller image"
            )
        self._survey, self._asked = survey, asked
        self._found = [_Candidate(point) for point in every if point.spent <= asked]
        self._waiting = list(self._found)
        self._ordered = True  # no encoder was seen to lose less than a gentler one

    @property
    def losses(self) -> dict[str, float]:
        """The least loss within the budget by encoder, of those that were measured; rising."""
        known = [one.point for one in self._found if one.measured]
        return {one.encoder: one.loss for one in sorted(known, key=lambda point: point.loss)}

    def next(self, below: float) -> Point | None:
        """The best that was not given before; None where none loses less than `below` radians."""
        while self._waiting:
            best = min(self._waiting, key=lambda one: one.bound)
            if best.bound >= below:
                return None
            if best.measured:
                self._waiting.remove(best)
                return best.point
            self._learn(self._gentlest(best, below))
        return None

    def _gentlest(self, best: _Candidate, below: float) -> _Candidate:
        """Of an encoder and those gentler that may be the best too."""
        known = [one.bound for one in self._waiting if one.measured]
        limit = min([below, *known])
        gentler = [
            one
            for one in self._waiting
            if not one.measured and one.bound < limit and one.gentler(best)
        ]
        return max(gentler, key=_mildness, default=best)

    def _learn(self, one: _Candidate) -> None:
        """The decoder's loss first, since it takes less, then the encoder's."""
        site = one.point.site
        if not one.solved:
            within = (p for p in self._survey.points(site) if p.spent <= self._asked)
            one.point = min(within, key=lambda point: point.loss)  # the fastest is among them
            one.solved, one.measured = True, site is None
            return
        assert site is not None  # the dense encoder loses nothing by itself
        site = self._survey.measured(site)
        assert site.loss is not None
        angle = site.loss.angle
        one.point = replace(one.point, site=site, loss=angle + one.point.loss)
        one.measured = True
        self._ordered &= angle >= one.least
        for other in self._waiting:
            if not self._ordered:
                other.least = 0.0
            elif one.gentler(other):
                other.least = max(other.least, angle)


def _mildness(one: _Candidate) -> tuple[int, float]:
    site = one.point.site
    return (0, 0.0) if site is None else (site.method.at, site.method.keep)
