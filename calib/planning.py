"""From a profile to what can be reached: a survey of encoders and counts, one of them settled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeprune.calib.calibrate import CalibrationRequest, evidence_of, shown
from edgeprune.calib.encoder import measure_sites
from edgeprune.calib.schedule import Schedule, solve_timed
from edgeprune.calib.solvers._problem import Problem
from edgeprune.calib.ttft import (
    Costs,
    Operations,
    Point,
    losses,
    menu,
    open_costs,
    pick,
    points,
    spare,
)
from edgeprune.encoder_methods import AUTO, EncoderMethod, make
from edgeprune.errors import SpecError
from edgeprune.lowering import Lowering
from edgeprune.models import Adapter
from edgeprune.models._processor import Processor
from edgeprune.policies import Policy
from edgeprune.progress import Progress, silent
from edgeprune.timing import read_profile


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


def methods_of(text: str, adapter: Adapter) -> list[EncoderMethod]:
    """The menu that --encoder names: `auto` is some exits, one method itself, `dense` nothing;
    SpecError where it drops tokens, so that counts would have to be weighed anew with it."""
    if text == AUTO:
        return menu(adapter)
    method = make(text)
    if method is not None and not method.rejoins:
        raise SpecError(
            f"--encoder {method} changes how many visual tokens there are to prune, which a budget"
            " does not weigh; give --cr in its place, or choose exit"
        )
    return [] if method is None else [method]


def survey(work: Work, costs: Costs, methods: Sequence[EncoderMethod]) -> list[Point]:
    """What can be reached. Methods that lose more than their limit are left out; SpecError where
    the decoder's method follows no schedule."""
    shape = work.adapter.shape
    if work.policy.entry_tokens(shape, 1) is None:
        raise SpecError(
            f"{costs.option} chooses encoder and counts together; it needs --method auto or utp"
        )
    if shape.convolutions:
        raise SpecError(
            "--ttft takes all decoder layers to be as slow as each other, and some of this model's"
            " have a convolution in place of attention; give --cr"
        )
    evidence = evidence_of(work.request, work.adapter, work.policy, work.processor, work.report)
    placed = [work.adapter.encoder_site(method) for method in methods]
    given = work.request, work.adapter, work.processor, work.policy
    measured = measure_sites(*given, placed, work.report)
    sites = [site for site in measured if site.within_limit]
    tokens = shape.visual_tokens
    problem = Problem.pose(evidence.attention, evidence.loss, None, tokens, tokens * shape.layers)
    return points(costs, problem, sites)


def settle(work: Work, costs: Costs, found: Sequence[Point], asked: float) -> Settled:
    """The best encoder for a budget, and a schedule that is solved for it; SpecError where that
    budget is out of reach."""
    point = pick(costs, found, asked)
    adapter = work.adapter.with_encoder(point.site)
    evidence = evidence_of(work.request, adapter, work.policy, work.processor, work.report)
    work.report("solve schedule", 0, 1)
    times, floor = costs.times(), costs.times(floor=True)
    schedule = solve_timed(
        evidence,
        times,
        floor,
        spare(costs, asked, point.site),
        work.request.goal,
        shown(work.report),
    )
    if schedule is None:  # it has the point's counts at least
        raise SpecError(
            f"{costs.option}: {asked:.4g} {costs.name} leave nothing for the decoder; ask for more"
        )
    vision, prefill = costs.vision(point.site), costs.prefill(schedule.counts)
    spent = costs.before + vision + prefill
    others = losses(found, asked)
    return Settled(costs, point, adapter, schedule, asked, vision, prefill, spent, others)


def within_operations(work: Work, encoder: str, cr: float) -> Settled:
    """Encoder and schedule that take no more operations, at 64 text tokens, than the dense encoder
    and a decoder at a ratio."""
    costs = Operations(work.adapter)
    found = survey(work, costs, methods_of(encoder, work.adapter))
    return settle(work, costs, found, costs.of_ratio(cr))


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
    costs = open_costs(work.adapter, found)
    return settle(work, costs, survey(work, costs, methods_of(encoder, work.adapter)), asked)
