"""From a budget to an encoder and counts: the best within it, settled by their own calibration."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from edgeprune.calib.best_first import BestFirst
from edgeprune.calib.calibrate import evidence_of, shown
from edgeprune.calib.entry import measure_entry, pose
from edgeprune.calib.schedule import Schedule, solve_timed
from edgeprune.calib.survey import Survey, Work
from edgeprune.calib.ttft import Costs, Measured, Operations, Point, open_costs, spare
from edgeprune.errors import SpecError
from edgeprune.lowering import Lowering
from edgeprune.measured import ChoiceRecord, TimingRecord
from edgeprune.models import Adapter
from edgeprune.timing import read_profile

TRIES = 3
"""Encoders at most that get a calibration of their own for one budget."""


@dataclass(frozen=True)
class Settled:
    """An encoder and a schedule within a budget, counted in the costs' unit."""

    costs: Costs
    point: Point  # as the survey saw it
    adapter: Adapter  # with the encoder's site
    schedule: Schedule
    asked: float
    vision: float  # predicted
    prefill: float
    spent: float  # to the first token
    losses: dict[str, float] = field(default_factory=dict)  # the least loss within the budget, by
    # encoder, of those that were measured

    @property
    def loss(self) -> float:
        """Predicted, in radians: the encoder's angle and the schedule's."""
        site = self.point.site
        return self.schedule.objective + (site.loss.angle if site and site.loss else 0.0)

    @property
    def cr(self) -> float:
        """Of all V visual tokens, whichever left the encoder."""
        return self.schedule.cr * self.adapter.shape.least_ratio

    @property
    def choice(self) -> ChoiceRecord:
        """What the manifest says of the choice."""
        return ChoiceRecord(
            unit=self.costs.name,
            budget=self.asked,
            spent=self.spent,
            loss=self.loss,
            losses=self.losses,
        )

    @property
    def timing(self) -> TimingRecord | None:
        """What the manifest says of the time that was asked for; None where it was no time."""
        if not isinstance(self.costs, Measured):
            return None
        profile = self.costs.profile
        return TimingRecord(
            asked=self.asked,
            predicted=self.spent,
            before=self.costs.before,
            vision=self.vision,
            prefill=self.prefill,
            text_tokens=profile.text_tokens,
            backend=profile.backend,
            machine=profile.machine,
        )


def settle(work: Work, costs: Costs, encoder: str, asked: float) -> Settled:
    """The best for a budget of the encoders that --encoder names (`Survey`), and a schedule that is
    solved for it; SpecError where that budget is out of reach.

    The survey knows each encoder by the dense one's evidence. Where the best turns out worse with
    its own than the next is said to be, that one is calibrated too.
    """
    survey, best = Survey(work, costs, encoder), None
    ways = BestFirst(survey, asked)
    survey.check_named()
    for _ in range(TRIES):
        point = ways.next(best.loss if best else math.inf)
        if point is None:
            break
        one = _settled(work, costs, point, asked)
        if best is None or one.loss < best.loss:
            best = one
    assert best is not None  # an encoder within the budget was found, else BestFirst refuses it
    return replace(best, losses=ways.losses)


def _settled(work: Work, costs: Costs, point: Point, asked: float) -> Settled:
    """With the evidence of a point's own encoder."""
    adapter = work.adapter.with_encoder(point.site)
    evidence = evidence_of(work.request, adapter, work.policy, work.processor, work.report)
    entry = measure_entry(work.request, adapter, work.processor, work.policy, work.report)
    work.report("solve schedule", 0, 1)
    schedule = solve_timed(
        pose(evidence, entry),
        evidence,
        costs.times(),
        costs.times(floor=True),
        spare(costs, asked, point.site),
        work.adapter.shape.convolutions,
        work.request.goal,
        shown(work.report),
        np.array([point.counts[group[0] - 1] for group in costs.groups]),
    )
    assert schedule is not None  # the point's own counts fit
    vision, prefill = costs.vision(point.site), costs.prefill(schedule.counts)
    spent = costs.before + vision + prefill
    return Settled(costs, point, adapter, schedule, asked, vision, prefill, spent)


def within_operations(work: Work, encoder: str, cr: float) -> Settled:
    """Encoder and schedule that take no more operations, at 64 text tokens, than the dense encoder
    and a decoder at a ratio."""
    costs = Operations(work.adapter)
    return settle(work, costs, encoder, costs.of_ratio(cr))


def within_time(
    work: Work, profile: Path, encoder: str, asked: float, lowering: Lowering
) -> Settled:
    """Encoder and schedule for a time, by a stored profile."""
    found = read_profile(profile)
    ours = lowering.dtype.name, str(lowering.weights)
    if (timed := (found.model.dtype, found.model.weights)) != ours:
        raise SpecError(
            f"{profile} is of a bundle in {' with weights '.join(timed)}, this export is in"
            f" {' with weights '.join(ours)}; profile such a bundle"
        )
    costs = open_costs(work.adapter, found, work.policy)
    return settle(work, costs, encoder, asked)
