"""From a recipe to a bundle: check what is asked, calibrate where the method needs it, export.

Calibration and export know nothing of each other. They meet here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from edgeprune import policies
from edgeprune.calib.calibrate import CalibrationRequest, calibrate
from edgeprune.calib.encoder import SiteMeasurement, check_limit, check_method, placed
from edgeprune.calib.planning import Settled, within_operations, within_time
from edgeprune.calib.resuming import Tell, beside, quiet
from edgeprune.calib.samples import demo_samples, user_samples
from edgeprune.calib.schedule import Schedule, read_schedule
from edgeprune.calib.survey import Work, joint_spec
from edgeprune.calib.tuning import check_bits, check_samples, tune
from edgeprune.dial import on_common_sites
from edgeprune.errors import SpecError
from edgeprune.export.exporter import (
    Exported,
    ExportRequest,
    check_topk,
    export,
    preflight,
    read_records,
)
from edgeprune.export.ratios import Setting
from edgeprune.models import Adapter, open_model
from edgeprune.models._frames import changed_config
from edgeprune.models._memory import check_device, check_memory, parity_bytes
from edgeprune.models._processor import Processor, Prompt, random_prompt
from edgeprune.policies import Policy
from edgeprune.progress import Progress, silent
from edgeprune.recipe import DENSE_METHOD, Recipe
from edgeprune.spec import (
    ModelShape,
    Plan,
    PruneSpec,
    check_cr,
    check_reach,
    check_separators,
)

Choose = Callable[[Work], Settled]
"""Chooses encoder and counts of a joint recipe."""


@dataclass(frozen=True)
class Calibrated:
    """What is exported: the model with its encoder's site, and the counts of every ratio."""

    adapter: Adapter
    settings: tuple[Setting, ...]
    settled: Settled | None = None  # None: encoder and decoder were not chosen together


def make(
    recipe: Recipe,
    report: Progress = silent,
    tell: Tell = quiet,
    choose: Choose | None = None,
) -> Exported:
    """Calibrate where the method needs it, export, and check; SpecError where a plan cannot be.

    `tell` is told of the folder by which a calibration that was killed goes on. `choose` chooses
    encoder and counts of a joint recipe; None: by the recipe's own budget.
    """
    if recipe.joint:
        recipe = replace(recipe, spec=joint_spec(recipe.spec))
    policy = policies.make(recipe.spec)
    recipe.execution.require()
    if recipe.ratios:
        _check_dial(recipe.spec, policy)
    adapter = _open(recipe)
    recipe = replace(recipe, spec=_with_reached_ratio(recipe.spec, policy, adapter.shape))
    _check_sites(recipe, adapter, policy)
    samples, no_parity = _parity(recipe, adapter)
    _check_export(recipe, adapter, no_parity)
    processor = Processor(adapter)
    read_records(adapter, processor)  # what cannot be read is refused before minutes of calibration
    work = Work(_calibration(recipe), adapter, policy, processor, report)
    found = _chosen(recipe, work, choose) if recipe.joint else _calibrated(recipe, work, tell)
    request = _request(recipe, work, found, no_parity)
    prompts = _prompts(samples, recipe, found.adapter, processor)
    return export(request, found.adapter, policy, processor, prompts, report)


def _open(recipe: Recipe) -> Adapter:
    """The model, with the site of an encoder that is named; SpecError where there is none such."""
    adapter = open_model(
        recipe.model,
        recipe.revision,
        size=recipe.image_size,
        images=recipe.num_images,
        frames=recipe.frames,
        tiles=recipe.tiles,
        tokenizer=recipe.tokenizer,
    ).with_execution(recipe.execution)
    if recipe.delta is not None:
        video = recipe.frames is not None
        changed_config(adapter.vision_config, recipe.delta, video=video)  # SpecError soon
    return adapter if recipe.joint else placed(recipe.encoder, adapter)


def _check_dial(spec: PruneSpec, policy: Policy) -> None:
    """SpecError where a method's counts cannot be an input of the graphs."""
    if spec.exact:
        raise SpecError("--set counts= gives one ratio, --cr lists several; leave one of them out")
    if why := policy.why_frozen():
        raise SpecError(
            f"method {spec.method} takes one --cr a bundle: {why}; export a bundle for each ratio,"
            " or choose a method whose counts can be an input, such as utp or fastv"
        )


def _with_reached_ratio(spec: PruneSpec, policy: Policy, shape: ModelShape) -> PruneSpec:
    """The spec with the ratio that is reached, where that follows from given counts, or from the
    encoder where the decoder prunes nothing; SpecError where another one is asked for."""
    if not spec.exact and (spec.method != DENSE_METHOD or spec.cr != 1):
        return spec
    reached = policy.plan(shape, max(spec.cr, shape.least_ratio)).cr
    if spec.cr != 1 and abs(spec.cr / reached - 1) > 0.01:
        raise SpecError(
            f"--set counts={spec.options['counts']} reaches CR {reached:.4g}, --cr asks for"
            f" {spec.cr:g}; leave out --cr"
        )
    return replace(spec, cr=reached)


def _check_sites(recipe: Recipe, adapter: Adapter, policy: Policy) -> None:
    """SpecError where a ratio is out of reach, or the encoder's site does not go with the method
    or the target."""
    site = adapter.vision_config.site
    for spec in recipe.specs:
        check_reach(spec, adapter.shape)
        if site is not None:
            check_method(adapter, policy, spec.cr)
    if site is not None:
        check_topk(f"--encoder {site.method}", adapter.encoder_topk, recipe.target)


def _check_export(recipe: Recipe, adapter: Adapter, no_parity: str) -> None:
    """SpecError where the graphs or the weights cannot be written as the recipe asks."""
    preflight(recipe.folder, recipe.lowering, adapter)
    _check_keep(recipe, no_parity)
    given = recipe.samples_file is not None or recipe.model == "demo"
    check_samples(recipe.lowering, adapter, given)
    check_bits(recipe.lowering, adapter)


def _calibration(recipe: Recipe) -> CalibrationRequest:
    return CalibrationRequest(
        recipe.spec.cr,
        recipe.samples,
        recipe.samples_file,
        recipe.image_dir,
        recipe.solver,
        recipe.max_sites,
        solve_seconds=recipe.solve_seconds,
    )


def _chosen(recipe: Recipe, work: Work, choose: Choose | None) -> Calibrated:
    """Encoder and schedule, chosen together."""
    if choose is not None:
        settled = choose(work)
    elif recipe.ttft is not None and recipe.profile is not None:
        settled = within_time(work, recipe.profile, recipe.encoder, recipe.ttft, recipe.lowering)
    else:
        settled = within_operations(work, recipe.encoder, recipe.spec.cr)
    spec = replace(recipe.spec, cr=settled.cr)
    settings = _settings([spec], [settled.schedule], work.policy, settled.adapter.shape)
    return Calibrated(settled.adapter, settings, settled)


def _calibrated(recipe: Recipe, work: Work, tell: Tell) -> Calibrated:
    """The encoder's site with its loss, and a schedule for each ratio where the method needs one;
    SpecError where the site loses more than its limit."""
    adapter, policy = work.adapter, work.policy
    if (site := adapter.vision_config.site) is not None:
        given = work.request, adapter, work.processor, policy, work.report
        site = SiteMeasurement(*given).of(site)
        check_limit(site)
        adapter = adapter.with_encoder(site)
        work = replace(work, adapter=adapter)
    schedules = [_schedule(recipe, spec, work, tell) for spec in recipe.specs]
    return Calibrated(adapter, _settings(recipe.specs, schedules, policy, adapter.shape))


def _schedule(recipe: Recipe, spec: PruneSpec, work: Work, tell: Tell) -> Schedule | None:
    """The schedule of a method that needs one: a file's, or calibrated now."""
    adapter, policy = work.adapter, work.policy
    if policy.entry_tokens(adapter.shape, spec.cr) is None:
        if recipe.schedule is not None:
            raise SpecError(f"method {spec.method} follows no schedule; leave out --schedule")
        return None
    if recipe.schedule is not None:
        return read_schedule(recipe.schedule, adapter.shape, spec.cr)
    request = replace(work.request, cr=spec.cr, work=beside(recipe.folder))
    return calibrate(request, adapter, policy, work.processor, work.report, tell=tell)


def _settings(
    asked: Sequence[PruneSpec],
    schedules: Sequence[Schedule | None],
    policy: Policy,
    shape: ModelShape,
) -> tuple[Setting, ...]:
    """Every ratio with its counts; SpecError where one cannot be."""
    plans = list[Plan]()
    for spec, schedule in zip(asked, schedules, strict=True):
        plan = policy.plan(shape, spec.cr, schedule)
        check_cr(plan, spec.cr)
        check_separators(plan, shape)
        plans.append(plan)
    records = [schedule.record() if schedule else None for schedule in schedules]
    if len(plans) > 1:
        plans = list(on_common_sites(plans))
    return tuple(map(Setting, asked, plans, records))


def _request(recipe: Recipe, work: Work, found: Calibrated, no_parity: str) -> ExportRequest:
    """What is exported and how; scales of quantised weights are measured on samples."""
    setting, settled = found.settings[0], found.settled
    given = work.request, recipe.lowering, found.adapter, work.policy, setting.plan
    return ExportRequest(
        model=recipe.model_name,
        spec=setting.spec,
        plan=setting.plan,
        output=recipe.folder,
        target=recipe.target,
        dtype=recipe.dtype,
        weights=recipe.weights,
        schedule=setting.schedule,
        dial=found.settings if recipe.ratios else (),
        no_parity=no_parity,
        keep_fp32=recipe.keep_fp32,
        profilable=recipe.profilable,
        delta=recipe.delta,
        timing=settled.timing if settled else None,
        choice=settled.choice if settled else None,
        tuning=tune(*given, work.processor, work.report),
    )


def _parity(recipe: Recipe, adapter: Adapter) -> tuple[int, str]:
    """How many samples to check, and why none where none."""
    asked = recipe.parity
    if asked is not None and asked < 0:
        raise SpecError(f"--parity is a number of samples, 0 for none; got {asked}")
    if asked == 0:
        return 0, "left out by --parity 0"
    count = asked or 8
    advice = "check fewer samples with --parity N, or none with --parity 0"
    check_memory(parity_bytes(adapter, count), "parity", advice)
    check_device(adapter, "parity")
    return count, ""


def _check_keep(recipe: Recipe, no_parity: str) -> None:
    """SpecError where parts are to stay in float32 and none can, or none can be found."""
    if recipe.keep_fp32 == "none":
        return
    dtype = recipe.lowering.dtype.name
    if dtype != "fp16":
        raise SpecError(f"--keep-fp32 is for fp16, this export is {dtype}; leave it out")
    if no_parity:
        raise SpecError(
            "--keep-fp32 auto measures on the samples of the parity check, which is"
            f" {no_parity}; give --parity N"
        )


def _prompts(
    count: int, recipe: Recipe, adapter: Adapter, processor: Processor
) -> Iterable[Prompt]:
    """The demo's own scenes, the user's calibration samples, or noise."""
    if recipe.samples_file is not None and recipe.sample_images is not None:
        found = user_samples(processor, recipe.samples_file, recipe.sample_images, count)
        return [sample.prompt for sample in found]
    if recipe.model == "demo":
        return [sample.prompt for sample in demo_samples(processor, count)]
    shape = adapter.shape
    return [random_prompt(adapter.pixels, shape.vocabulary, seed) for seed in range(count)]
