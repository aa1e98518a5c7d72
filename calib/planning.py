"""From a profile to what can be reached: a survey of encoders and counts, one of them settled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edgeprune.calib.calibrate import CalibrationRequest, evidence_of, shown
from edgeprune.calib.encoder import check_limit, chooses, measure_sites
from edgeprune.calib.entry import behind_drop, left_tokens, measure_entry, pose
from edgeprune.calib.schedule import Schedule, solve_timed
from edgeprune.calib.solvers._problem import Problem
from edgeprune.calib.ttft import (
    Costs,
    Measured,
    Operations,
    Point,
    Way,
    menu,
    open_costs,
    points,
    spare,
    within,
)
from edgeprune.encoder_methods import AUTO, make
from edgeprune.errors import SpecError
from edgeprune.lowering import Lowering
from edgeprune.measured import ChoiceRecord, TimingRecord
from edgeprune.models import Adapter
from edgeprune.models._encoder_site import SiteConfig
from edgeprune.models._processor import Processor
from edgeprune.policies import Policy
from edgeprune.progress import Progress, silent
from edgeprune.spec import PruneSpec
from edgeprune.timing import read_profile

TRIES = 3
"""Encoders at most that get a calibration of their own for one budget."""


@dataclass(frozen=True)
class Work:
    """What a survey measures with."""

    request: CalibrationRequest
    adapter: Adapter  # its encoder dense
    policy: Policy
    processor: Processor
    report: Progress = silent


@dataclass(frozen=True)
class Settled:
    """An encoder and a schedule within a budget, counted in the costs' unit."""

    costs: Costs
    point: Point  # as the survey saw it
    adapter: Adapter  # with the encoder's site
    schedule: Schedule
    asked: float
    vision_ms: float  # predicted
    prefill_ms: float
    ms: float  # to the first token
    others: dict[str, float]  # the least loss within the budget, by encoder

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
            spent=self.ms,
            loss=self.loss,
            weighed=self.others,
        )

    @property
    def timing(self) -> TimingRecord | None:
        """What the manifest says of the time that was asked for; None where it was no time."""
        if not isinstance(self.costs, Measured):
            return None
        profile = self.costs.profile
        return TimingRecord(
            asked=self.asked,
            predicted=self.ms,
            before=self.costs.before,
            vision=self.vision_ms,
            prefill=self.prefill_ms,
            text_tokens=profile.text_tokens,
            backend=profile.backend,
            machine=profile.machine,
        )


def joint_spec(spec: PruneSpec) -> PruneSpec:
    """The spec of a method that is chosen together with an encoder: tokens keep their positions,
    unless it says otherwise. Published methods renumber what they choose before layer 1, which
    turns the output more than the tokens that are missed."""
    return replace(spec, options={"positions": "keep", **spec.options})


def survey(work: Work, costs: Costs, encoder: str) -> list[Point]:
    """What can be reached with the encoders that --encoder names: `auto` is some exits and drops,
    one method itself, `dense` nothing. Of `auto` the budget says what may be lost. SpecError where
    a method that is named loses more than its limit, or the decoder's follows no schedule."""
    shape = work.adapter.shape
    if work.policy.entry_tokens(shape, 1) is None:
        raise SpecError(
            "this method follows no schedule, so no counts can be chosen for a budget; give"
            " --method auto or utp"
        )
    sites = _sites(work, encoder)
    return points(costs, _ways(work, sites))


def _sites(work: Work, encoder: str) -> list[SiteConfig]:
    """What --encoder names, measured."""
    named = None if encoder == AUTO else make(encoder)
    methods = menu(work.adapter) if encoder == AUTO else [named] if named else []
    placed = [work.adapter.encoder_site(method) for method in methods]
    given = work.request, work.adapter, work.processor, work.policy
    measured = measure_sites(*given, placed, work.report)
    if encoder != AUTO:
        for site in measured:
            check_limit(site)
    return measured


def _ways(work: Work, sites: Sequence[SiteConfig]) -> list[Way]:
    """The encoders and the schedules behind each, by the dense encoder's evidence."""
    given = work.processor, work.policy, work.report
    evidence = evidence_of(work.request, work.adapter, work.policy, work.processor, work.report)
    entry = measure_entry(work.request, work.adapter, *given)
    all_enter, open_entry = pose(evidence, None), pose(evidence, entry)

    def behind(site: SiteConfig) -> Problem:
        adapter = work.adapter.with_encoder(site)
        ours = entry if entry and chooses(adapter, work.policy) else None
        if site.method.rejoins:
            return open_entry if ours else all_enter
        left = left_tokens(work.request, adapter, *given)
        return pose(behind_drop(evidence, left), ours)

    return [(None, open_entry), *((site, behind(site)) for site in sites)]


def settle(work: Work, costs: Costs, found: Sequence[Point], asked: float) -> Settled:
    """The best encoder for a budget, and a schedule that is solved for it; SpecError where that
    budget is out of reach.

    The survey knows each encoder by the dense one's evidence. Where the best turns out worse with
    its own than the next is said to be, that one is calibrated too.
    """
    best: Settled | None = None
    weighed = within(costs, found, asked)
    others = {point.encoder: point.loss for point in weighed}
    for point in weighed[:TRIES]:
        if best is not None and best.loss <= point.loss:
            break
        one = _settled(work, costs, point, asked, others)
        if one is not None and (best is None or one.loss < best.loss):
            best = one
    if best is None:  # it has the point's counts at least
        raise SpecError(
            f"{costs.option}: {asked:.4g} {costs.name} leave nothing for the decoder; ask for more"
        )
    return best


def _settled(
    work: Work, costs: Costs, point: Point, asked: float, others: dict[str, float]
) -> Settled | None:
    """With the evidence of a point's own encoder; None where no schedule fits."""
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
    if schedule is None:
        return None
    vision, prefill = costs.vision(point.site), costs.prefill(schedule.counts)
    spent = costs.before + vision + prefill
    return Settled(costs, point, adapter, schedule, asked, vision, prefill, spent, others)


def within_operations(work: Work, encoder: str, cr: float) -> Settled:
    """Encoder and schedule that take no more operations, at 64 text tokens, than the dense encoder
    and a decoder at a ratio."""
    costs = Operations(work.adapter)
    return settle(work, costs, survey(work, costs, encoder), costs.of_ratio(cr))


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
    return settle(work, costs, survey(work, costs, encoder), asked)
