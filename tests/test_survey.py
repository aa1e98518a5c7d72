"""What `--method auto` and `--ttft` weigh: encoders that drop tokens too, and how many enter."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.shapes import write
from edgeprune.bundle import Bundle
from edgeprune.calib.best_first import BestFirst
from edgeprune.calib.calibrate import CalibrationRequest, evidence_of
from edgeprune.calib.encoder import SiteMeasurement, chooses
from edgeprune.calib.entry import (
    EntryLoss,
    behind_drop,
    counts_of,
    left_tokens,
    measure_entry,
    pose,
)
from edgeprune.calib.planning import settle
from edgeprune.calib.schedule import Evidence, solve
from edgeprune.calib.solvers._problem import Goal
from edgeprune.calib.survey import Survey, Work, joint_spec
from edgeprune.calib.ttft import Operations, Point, menu, spare, undominated
from edgeprune.cli import main
from edgeprune.encoder_methods import AUTO, DENSE
from edgeprune.errors import SpecError
from edgeprune.models import open_model
from edgeprune.models._processor import Processor
from edgeprune.policies import make
from edgeprune.spec import ModelShape, PruneSpec
from tests.conftest import instruct_records
from tests.encoder_sites import site_of
from tests.test_timing import PROFILE
from tests.tiny import TINY

RATIOS = 2, 4, 8, 16


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """Six decoder layers, so that above CR 4 what enters layer 1 leaves some for the others."""
    folder = tmp_path_factory.mktemp("work")
    shape = replace(TINY, layers=6, vision_layers=3)
    adapter, samples = open_model(str(write(shape, folder / "tiny"))), instruct_records(folder)
    policy = make(joint_spec(PruneSpec("utp")))
    request = CalibrationRequest(1, file=samples, samples=5)
    return Work(request, adapter, policy, Processor(adapter))


@pytest.fixture(scope="module")
def weighed(work: Work) -> list[Point]:
    """All that is weighed, by operations."""
    return Survey(work, Operations(work.adapter), AUTO).all_points()


def test_no_pair_of_an_encoder_and_a_ratio_is_better(work: Work, weighed: list[Point]) -> None:
    """By predicted loss, within the operations that the pair takes, to the rounding of units. The
    survey's sweeps are coarser than a search for one ratio; what is settled is not."""
    costs, given = Operations(work.adapter), (work.processor, work.policy)
    evidence = evidence_of(work.request, work.adapter, work.policy, work.processor)
    entry = measure_entry(work.request, work.adapter, *given)
    assert entry is not None
    measurement = SiteMeasurement(work.request, work.adapter, *given)
    sites = [measurement.of(work.adapter.encoder_site(method)) for method in menu(work.adapter)]
    pairs = 0
    for site in (None, *sites):
        behind = work.adapter.with_encoder(site)
        ours, tokens = evidence, behind.shape.encoded
        if behind.shape.after_encoder:
            ours = behind_drop(evidence, left_tokens(work.request, behind, *given))
        for cr in RATIOS:
            ratio = cr / behind.shape.least_ratio
            first = work.policy.entry_tokens(behind.shape, cr) if ratio >= 1 else None
            if first is None or (first < tokens and not chooses(behind, work.policy)):
                continue  # export would refuse it
            schedule = solve(ours, cr=ratio, first=first, goal=Goal(seconds=0))
            spent = costs.before + costs.vision(site) + costs.prefill(schedule.counts)
            turned = site.loss.angle if site and site.loss else 0.0
            lost = turned + entry.by_count(tokens)[first] + schedule.objective
            rounding = costs.unit * len(schedule.counts)
            assert within(weighed, spent + rounding)[0].loss <= 1.05 * lost
            pairs += first < tokens
            if site is None:
                settled = settle(work, costs, DENSE, spent + rounding)
                assert settled.loss <= lost + 1e-9
    assert pairs >= 10


def within(found: list[Point], asked: float) -> list[Point]:
    """The best with each encoder of all that fit, the best of all first."""
    best = dict[str, Point]()
    for one in found:
        kept = best.get(one.encoder)
        if one.spent <= asked and (kept is None or one.loss < kept.loss):
            best[one.encoder] = one
    return sorted(best.values(), key=lambda point: point.loss)


def test_what_is_measured_is_as_by_measuring_all(work: Work, weighed: list[Point]) -> None:
    """Each encoder that comes, until all did."""
    costs = Operations(work.adapter)
    for cr in (1.2, 4):
        asked = costs.of_ratio(cr)
        ways, found = BestFirst(Survey(work, costs, AUTO), asked), list[Point]()
        while (point := ways.next(math.inf)) is not None:
            found.append(point)
        wanted = {one.encoder: (one.loss, one.counts) for one in within(weighed, asked)}
        assert {one.encoder: (one.loss, one.counts) for one in found} == wanted
        assert ways.losses == {encoder: loss for encoder, (loss, _) in wanted.items()}


def test_what_cannot_change_the_choice_is_not_measured(work: Work, tmp_path: Path) -> None:
    """Nothing is lost where all operations of the dense model are allowed."""
    request = replace(work.request, cache=tmp_path)
    costs = Operations(work.adapter)
    found = settle(replace(work, request=request), costs, AUTO, costs.of_ratio(1))
    assert found.point.encoder == "dense" and found.loss == 0
    assert found.losses == {"dense": 0}
    assert not [*tmp_path.glob("*-encoder.npz"), *tmp_path.glob("*-left.npz")]


def test_out_of_reach_is_said_without_a_measurement(work: Work, tmp_path: Path) -> None:
    request = replace(work.request, cache=tmp_path)
    costs = Operations(work.adapter)
    with pytest.raises(SpecError, match=r"out of reach: the least that is predicted is \S+ \(enc"):
        settle(replace(work, request=request), costs, AUTO, costs.before)
    assert not [*tmp_path.iterdir()]


def test_an_encoder_that_is_named_and_loses_too_much_is_refused(work: Work) -> None:
    """The dense one is not taken in its place without a word."""
    named = "exit:at=0:keep=0.25:limit=0.0001"
    with pytest.raises(SpecError, match=r"at most 0\.0001 is taken"):
        settle(work, Operations(work.adapter), named, math.inf)


def test_what_is_settled_keeps_to_the_budget(work: Work, weighed: list[Point]) -> None:
    costs = Operations(work.adapter)
    asked = undominated(weighed)[0].spent + 64 * costs.unit
    found = settle(work, costs, AUTO, asked)
    assert found.spent <= asked and 0 <= found.schedule.bound <= found.schedule.objective
    assert found.schedule.counts[0] < 16, "with all tokens in layer 1 it cannot be reached"
    assert found.cr == pytest.approx(16 * 6 / sum(found.schedule.counts))


def test_what_is_said_to_be_reached_is(work: Work, weighed: list[Point]) -> None:
    """Schedules count layers in units, rounded up; so does the survey."""
    costs, fastest = Operations(work.adapter), undominated(weighed)
    times = costs.times()
    for point in fastest:
        spent = times.of(np.array([point.counts]))[0]
        assert spare(costs, point.spent, point.site) == spent
    first = fastest[0]
    assert settle(work, costs, AUTO, first.spent).spent <= first.spent
    survey = Survey(work, costs, AUTO)
    least = [survey.fastest(site) for site in (None, *survey.sites)]
    assert min(point.spent for point in least) == first.spent  # as costs alone say


def test_the_fastest_time_is_below_that_of_a_dense_layer(
    deep_tower: Path, instruct: Path, tmp_path: Path
) -> None:
    """A bundle for it is exported and equals its reference."""
    profile, output = tmp_path / "made-up.json", tmp_path / "b"
    profile.write_text(PROFILE.to_json())
    model = ["--model", str(deep_tower), "--samples-file", str(instruct), "--profile", str(profile)]
    asked = 29  # 3 before and 17 of vision; a layer that all 16 tokens enter takes 12
    options = ["--encoder", "drop:at=1:keep=0.5:limit=3", "--ttft", str(asked), "--parity", "1"]
    assert main(["export", *model, *options, "-o", str(output)]) == 0
    manifest = Bundle.open(output).manifest
    timing, prune = manifest.timing, manifest.prune
    assert timing is not None and timing.predicted <= asked and timing.prefill < 12
    assert manifest.encoder.method.startswith("drop") and prune.stages[0].survivors == 8
    assert prune.counts[0] < 8 and prune.options["positions"] == "keep"
    assert prune.cr_reached == pytest.approx(16 * 3 / sum(prune.counts))
    assert manifest.parity.samples == 1


def test_an_entry_is_measured_where_the_method_can_choose(work: Work) -> None:
    given = work.processor, work.policy
    found = measure_entry(work.request, work.adapter, *given)
    assert found is not None and found.counts == (1, 2, 4, 8, 16)
    assert found.angles[-1] == 0 < found.angles[0]
    assert all(a >= b for a, b in zip(found.angles, found.angles[1:], strict=False))
    assert measure_entry(work.request, work.adapter, *given) == found  # from the cache
    early = work.adapter.with_encoder(site_of(work.adapter, "exit:at=0:keep=0.5"))
    assert measure_entry(work.request, early, *given) is None
    shape = ModelShape("llava", 100, (10, 10), 4, 8, 16, 4, 2, 8, 66, 512, True, separators=20)
    assert counts_of(shape) == (21, 25, 50, 100)


def test_between_measured_counts_losses_are_a_line() -> None:
    found = EntryLoss((1, 4, 8), (0.9, 0.3, 0.0))
    wanted = [0.9, 0.9, 0.7, 0.5, 0.3, 0.225, 0.15, 0.075, 0.0]
    assert found.by_count(8).tolist() == pytest.approx(wanted)
    assert found.by_count(4).tolist() == pytest.approx([0.6, 0.6, 0.4, 0.2, 0.0])


def test_evidence_behind_a_drop_is_that_of_the_tokens_left() -> None:
    rng = np.random.default_rng(0)
    attention, loss = rng.random((2, 3, 5)), rng.random((2, 3))
    entry = rng.normal(size=(2, 5))
    left = np.array([[0, 3, 4], [1, 2, 3]])
    found = behind_drop(Evidence(attention, loss, entry, ("a", "b")), left)
    assert found.attention[1].tolist() == attention[1][:, left[1]].tolist()
    assert found.entry is not None and found.entry[0].tolist() == entry[0, left[0]].tolist()
    problem = pose(found, EntryLoss((1, 5), (0.4, 0.0)))
    assert problem.least == 1
    whole = float(problem.evaluate(np.array([[3, 3, 3, 3]]))[0])
    one = float(problem.evaluate(np.array([[3, 1, 1, 1]]))[0])
    assert (whole, one) == (0, pytest.approx(0.2))  # 0.4 less what 3 of 5 lose
    assert pose(found, None).least is None
