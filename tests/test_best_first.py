"""Which encoders are measured for one budget, of surveys that are made up."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgeprune.calib.best_first import BestFirst
from edgeprune.calib.ttft import Point
from edgeprune.encoder_methods import load
from edgeprune.errors import SpecError

AT, KEEP = (0, 1, 2), (0.7, 0.5, 0.35)


@dataclass
class MadeUp:
    """Encoders with the angle, the decoder's loss and the cost that each is given."""

    angles: dict[str, float]
    decoder: dict[str, float]
    spent: dict[str, float]
    sites: list[Any] = field(default_factory=list)
    measurements: list[str] = field(default_factory=list)
    costs = SimpleNamespace(option="--ttft", name="ms")

    def fastest(self, site: Any) -> Point:
        return Point(self.spent[name_of(site)], 0.0, site, 0.0, 0.0, (1,), 1.0)

    def points(self, site: Any) -> list[Point]:
        fastest, name = self.fastest(site), name_of(site)
        turned = site.loss.angle if site and site.loss else 0.0
        others = (1.0, 0.5), (2.0, 0.0)  # beyond the fastest: what is spent, and lost less
        spends = [(0.0, 1.0), *others]
        return [
            replace(fastest, spent=fastest.spent + more, loss=turned + lost * self.decoder[name])
            for more, lost in spends
        ]

    def measured(self, site: Any) -> Any:
        name = name_of(site)
        self.measurements.append(name)
        loss = SimpleNamespace(angle=self.angles[name])
        return SimpleNamespace(method=site.method, loss=loss)


def name_of(site: Any) -> str:
    return "dense" if site is None else str(site.method)


def made_up(seed: int) -> MadeUp:
    """An encoder loses no less than a gentler one."""
    rng = np.random.default_rng(seed)
    found = MadeUp({}, {"dense": rng.random()}, {"dense": 9.0})
    for method in ("exit", "drop"):
        by_block = np.sort(rng.random(len(AT)))[::-1]
        by_share = np.sort(rng.random(len(KEEP)))
        for at, early in zip(AT, by_block, strict=True):
            for keep, few in zip(KEEP, by_share, strict=True):
                site = SimpleNamespace(method=load(method)(at=at, keep=keep), loss=None)
                found.sites.append(site)
                name = name_of(site)
                found.angles[name] = 0.4 * (early + few)
                found.decoder[name] = rng.random()
                found.spent[name] = 3 + 6 * keep + rng.random()
    return found


def all_measured(survey: MadeUp, asked: float) -> list[tuple[float, str]]:
    """Each encoder's least loss within a budget, the least first."""
    found = list[tuple[float, str]]()
    for site in (None, *survey.sites):
        points = survey.points(site and survey.measured(site))
        if fit := [point.loss for point in points if point.spent <= asked]:
            found.append((min(fit), name_of(site)))
    survey.measurements.clear()
    return sorted(found, key=lambda one: one[0])


@pytest.mark.parametrize("seed", range(20))
def test_all_come_in_the_order_of_measuring_all(seed: int) -> None:
    survey = made_up(seed)
    for asked in (7.0, 8.0, 9.5, 12.0):
        ways, given = BestFirst(survey, asked), list[tuple[float, str]]()  # type: ignore[arg-type]
        while (point := ways.next(math.inf)) is not None:
            given.append((point.loss, point.encoder))
        assert given == all_measured(survey, asked)
        assert list(ways.losses.items()) == [(name, loss) for loss, name in given]


def test_the_best_takes_fewer_measurements() -> None:
    """None of encoders that do not fit, none twice, half of the others at most on average."""
    taken = fits = 0
    for seed in range(20):
        survey = made_up(seed)
        wanted = all_measured(survey, 8.0)
        point = BestFirst(survey, 8.0).next(math.inf)  # type: ignore[arg-type]
        assert point is not None and (point.loss, point.encoder) == wanted[0]
        fitting = {name for _, name in wanted}
        assert fitting >= set(survey.measurements)
        assert len(set(survey.measurements)) == len(survey.measurements)
        taken, fits = taken + len(survey.measurements), fits + len(fitting)
    assert taken <= fits / 2


def test_nothing_is_measured_that_cannot_lose_less() -> None:
    survey = made_up(0)
    ways = BestFirst(survey, 20.0)  # type: ignore[arg-type]
    assert ways.next(0.0) is None and not survey.measurements
    point = ways.next(math.inf)
    assert point is not None and point.encoder == "dense" and point.loss == 0
    assert not survey.measurements and ways.losses == {"dense": 0}


def test_the_gentlest_is_measured_first_and_bounds_the_others() -> None:
    survey = made_up(0)
    for name in survey.angles:
        survey.angles[name] = 1.0
    survey.decoder = dict.fromkeys(survey.decoder, 0.0) | {"dense": 0.5}
    survey.spent = dict.fromkeys(survey.spent, 5.0)
    point = BestFirst(survey, 5.5).next(math.inf)  # type: ignore[arg-type]
    assert point is not None and point.encoder == "dense"
    assert survey.measurements == ["exit:at=2:keep=0.7", "drop:at=2:keep=0.7"]


def test_out_of_reach_names_the_least_of_all() -> None:
    survey = made_up(0)
    name = min(survey.spent, key=lambda name: survey.spent[name])
    wanted = rf"--ttft: 1 ms are out of reach: .* is {survey.spent[name]:.4g} \(encoder {name}, CR"
    with pytest.raises(SpecError, match=wanted):
        BestFirst(survey, 1.0)  # type: ignore[arg-type]
    assert not survey.measurements


def test_where_a_gentler_encoder_loses_more_all_that_may_be_the_best_are_measured() -> None:
    """What the second measurement shows."""
    survey = made_up(0)
    survey.decoder = dict.fromkeys(survey.decoder, 0.0) | {"dense": 9.0}
    survey.decoder |= {f"exit:at={at}:keep=0.7": 5.0 for at in AT}  # others may be the best
    survey.spent = dict.fromkeys(survey.spent, 5.0)
    for site in survey.sites:
        survey.angles[name_of(site)] = 1.5 if site.method.name == "drop" else 1.0
    survey.angles |= {"exit:at=2:keep=0.5": 0.9, "exit:at=0:keep=0.35": 0.1}
    wanted = all_measured(survey, 5.5)
    point = BestFirst(survey, 5.5).next(math.inf)  # type: ignore[arg-type]
    assert point is not None and (point.loss, point.encoder) == wanted[0]
    assert point.encoder == "exit:at=0:keep=0.35" and point.loss == 0.1
