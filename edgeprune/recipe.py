"""A recipe is all that decides a bundle; making it calibrates where the method needs that, and
exports. Calibration and export know nothing of each other: they meet here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgeprune import encoder_methods, policies
from edgeprune.calib.calibrate import CalibrationRequest, calibrate
from edgeprune.calib.encoder import check_limit, check_method, measure_site, placed
from edgeprune.calib.planning import (
    Settled,
    Work,
    joint_spec,
    within_operations,
    within_time,
)
from edgeprune.calib.resuming import Tell, beside, quiet
from edgeprune.calib.samples import check_image_dir, demo_samples, user_samples
from edgeprune.calib.schedule import Schedule, read_schedule
from edgeprune.calib.tuning import check_bits, check_samples, tune
from edgeprune.dial import check_ratios, on_common_sites
from edgeprune.encoder_methods import DENSE
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
from edgeprune.lowering import Lowering, resolve
from edgeprune.models import Adapter, open_model
from edgeprune.models._execution import Execution
from edgeprune.models._frames import changed_config
from edgeprune.models._memory import check_device, check_memory, parity_bytes
from edgeprune.models._processor import Processor, Prompt, random_prompt
from edgeprune.policies import Policy
from edgeprune.progress import Progress, silent
from edgeprune.spec import (
    ModelShape,
    Plan,
    PruneSpec,
    check_cr,
    check_reach,
    check_separators,
)
from edgeprune.tiling import Size

DENSE_METHOD = "none"
"""The method that prunes nothing: its ratio is what the encoder leaves."""


@dataclass(frozen=True)
class Recipe:
    """A model, a method and its ratio, what to calibrate on, and how to lower the graphs."""

    spec: PruneSpec
    output: Path | None = None  # None: out/MODEL-METHOD-crCR, with -seedN where one is drawn with
    model: str = "demo"
    revision: str | None = None
    tokenizer: Path | None = None  # a folder whose tokenizer is used; None: the checkpoint's own
    image_size: Size | None = None  # of the images to freeze for; None: the family's default
    num_images: int = 1  # images in a prompt
    frames: int | None = None  # of a video, in place of images
    tiles: int | None = None  # of an image that are encoded; None: all
    target: str = "cpu"
    dtype: str | None = None  # None: the target's own
    weights: str = "float"  # int8 or int4, with options: edgeprune/weight_format.py
    encoder: str = DENSE  # or what shortens it, with options: edgeprune/encoder_methods
    keep_fp32: str = "none"  # auto: in fp16, parts that float16 cannot hold stay in float32
    ttft: float | None = None  # milliseconds to the first token, in place of a ratio
    profile: Path | None = None  # of the device, by which they are counted
    device: str = "cpu"  # of calibration, and of the eager model in the parity check
    reference_dtype: str = "fp32"  # of calibration; parity is checked in float32
    profilable: bool = False  # whether the bundle is for edgeprune profile
    delta: float | None = None  # share of patches that are encoded of a frame of which few changed
    parity: int | None = None  # samples of the check; None: 8
    schedule: Path | None = None  # a file in place of a calibration
    samples: int = 100
    samples_file: Path | None = None  # LLaVA-Instruct; None: the demo's own scenes
    image_dir: Path | None = None  # where its images are; None: beside it
    solver: str = "joint"
    max_sites: int | None = None  # layers at most where a calibrated schedule falls
    solve_seconds: float | None = None  # of the search for a bound; None: by the problem's size
    ratios: tuple[float, ...] = ()  # where counts are an input: all, the default (of spec) first

    def __post_init__(self) -> None:
        check_ratios(self.ratios)
        if self.ratios and self.schedule is not None:
            raise SpecError("--schedule is of one ratio, --cr lists several; leave one of them out")
        check_image_dir(self.image_dir, self.samples_file)
        if (self.ttft is None) != (self.profile is None):
            raise SpecError("--ttft counts with a profile of the device; give --ttft and --profile")
        if self.ttft is not None and not (math.isfinite(self.ttft) and self.ttft > 0):
            raise SpecError(f"--ttft is a number of milliseconds above 0, got {self.ttft:g}")
        if self.profilable and self.spec.method != DENSE_METHOD:
            raise SpecError(
                "--profilable is for edgeprune profile, which times the dense model; give --method"
                " none"
            )
        auto = self.encoder == encoder_methods.AUTO
        if self.profilable and self.encoder != DENSE:
            raise SpecError(
                "--profilable is for edgeprune profile, which times the dense encoder; leave out"
                " --encoder"
            )
        if self.delta is not None and self.encoder != DENSE:
            raise SpecError(
                f"--delta and {'--method auto' if auto else '--encoder'} choose other patches of a"
                " frame; leave one of them out"
            )
        asked = "--method auto" if self.ttft is None else "--ttft"
        if self.joint and self.ratios:
            raise SpecError(f"{asked} chooses for one budget; give --cr one ratio")
        if self.joint and (self.schedule or self.max_sites):
            raise SpecError(
                f"{asked} solves a schedule, with as many sites as are best; leave out --schedule"
                " and --max-sites"
            )

    @property
    def joint(self) -> bool:
        """Whether encoder and decoder are chosen together, under one budget."""
        return self.ttft is not None or self.encoder == encoder_methods.AUTO

    @property
    def execution(self) -> Execution:
        """Where the eager model computes; SpecError where that is not known."""
        return Execution.parse(self.device, self.reference_dtype)

    @property
    def sample_images(self) -> Path | None:
        """Where the images of `samples_file` are."""
        return self.image_dir or (self.samples_file.parent if self.samples_file else None)

    @property
    def model_name(self) -> str:
        """A hub id, or the folder's name: a bundle holds no path of the machine that made it."""
        return Path(self.model).resolve().name if Path(self.model).exists() else self.model

    @property
    def lowering(self) -> Lowering:
        """How graphs and weights are written; SpecError where that is not known."""
        return resolve(self.target, self.dtype, self.weights)

    @property
    def folder(self) -> Path:
        """Where the bundle goes."""
        if self.output is not None:
            return self.output
        name, spec = self.model_name.rpartition("/")[2], self.spec
        ratio = f"-cr{spec.cr:.4g}" if spec.cr != 1 else ""
        if self.ratios:
            ratio = "-cr" + "-".join(f"{cr:.4g}" for cr in self.ratios)
        if self.ttft is not None:
            return Path("out") / f"{name}-{spec.method}-ttft{self.ttft:g}"
        if self.joint:
            return Path("out") / f"{name}-{spec.method}{ratio}-auto"
        seed = policies.seed_of(policies.make(spec))
        method = encoder_methods.make(self.encoder)
        encoder = f"-{method}".replace(":", "-").replace("=", "") if method else ""
        seeded = f"-seed{seed}" if seed else ""
        return Path("out") / f"{name}-{spec.method}{ratio}{encoder}{seeded}"


def make(
    recipe: Recipe,
    report: Progress = silent,
    tell: Tell = quiet,
    choose: Callable[[Work], Settled] | None = None,
) -> Exported:
    """Calibrate where the method needs it, export, and check; SpecError where a plan cannot be.

    `tell` is told of the folder by which a calibration that was killed goes on. `choose` chooses
    encoder and counts of a joint recipe; None: by the recipe's own budget.
    """
    if recipe.joint:
        recipe = replace(recipe, spec=joint_spec(recipe.spec))
    spec, policy = recipe.spec, policies.make(recipe.spec)
    recipe.execution.require()
    if recipe.ratios:
        _check_dial(spec, policy)
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
    if not recipe.joint:
        adapter = placed(recipe.encoder, adapter)
    asked = [replace(spec, cr=cr) for cr in recipe.ratios] or [spec]
    if spec.exact or (spec.method == DENSE_METHOD and spec.cr == 1):
        spec = with_reached_ratio(spec, policy, adapter.shape)
        recipe = replace(recipe, spec=spec)
        asked = [spec]
    site = adapter.vision_config.site
    for one in asked:
        check_reach(one, adapter.shape)
        if site is not None:
            check_method(adapter, policy, one.cr)
    if site is not None:
        check_topk(f"--encoder {site.method}", adapter.encoder_topk, recipe.target)
    samples, why = _parity(recipe, adapter)
    preflight(recipe.folder, recipe.lowering, adapter)
    _check_keep(recipe, why)
    given = recipe.samples_file is not None or recipe.model == "demo"
    check_samples(recipe.lowering, adapter, given)
    check_bits(recipe.lowering, adapter)
    processor = Processor(adapter)
    read_records(adapter, processor)  # what cannot be read is refused before minutes of calibration
    calibration, settled = _calibration(recipe), None
    schedules: list[Schedule | None]
    if recipe.joint:
        work = Work(calibration, adapter, policy, processor, report)
        settled = choose(work) if choose else _settled(recipe, work)
        adapter, schedules = settled.adapter, [settled.schedule]
        spec = replace(spec, cr=settled.cr)
        recipe, asked = replace(recipe, spec=spec), [spec]
    else:
        if site is not None:
            site = measure_site(calibration, adapter, processor, policy, site, report)
            check_limit(site)
            adapter = adapter.with_encoder(site)
        schedules = [
            _schedule(replace(recipe, spec=one), adapter, policy, processor, report, tell)
            for one in asked
        ]
    settings = _settings(asked, schedules, policy, adapter.shape)
    spec, plan = settings[0].spec, settings[0].plan
    request = ExportRequest(
        model=recipe.model_name,
        spec=spec,
        plan=plan,
        output=recipe.folder,
        target=recipe.target,
        dtype=recipe.dtype,
        weights=recipe.weights,
        schedule=settings[0].schedule,
        dial=settings if recipe.ratios else (),
        no_parity=why,
        keep_fp32=recipe.keep_fp32,
        profilable=recipe.profilable,
        delta=recipe.delta,
        timing=settled.timing if settled else None,
        choice=settled.choice if settled else None,
        tuning=tune(calibration, recipe.lowering, adapter, policy, plan, processor, report),
    )
    prompts = _prompts(samples, recipe, adapter, processor)
    return export(request, adapter, policy, processor, prompts, report)


def _check_dial(spec: PruneSpec, policy: Policy) -> None:
    """SpecError where a method's counts cannot be an input of the graphs."""
    if spec.exact:
        raise SpecError("--set counts= gives one ratio, --cr lists several; leave one of them out")
    if why := policy.why_frozen():
        raise SpecError(
            f"method {spec.method} takes one --cr a bundle: {why}; export a bundle for each ratio,"
            " or choose a method whose counts can be an input, such as utp or fastv"
        )


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


def with_reached_ratio(spec: PruneSpec, policy: Policy, shape: ModelShape) -> PruneSpec:
    """The spec of given counts, or of nothing pruned behind the encoder, with the ratio that is
    reached; SpecError where another is asked."""
    reached = policy.plan(shape, max(spec.cr, shape.least_ratio)).cr
    if spec.cr != 1 and abs(spec.cr / reached - 1) > 0.01:
        raise SpecError(
            f"--set counts={spec.options['counts']} reaches CR {reached:.4g}, --cr asks for"
            f" {spec.cr:g}; leave out --cr"
        )
    return replace(spec, cr=reached)


def _schedule(
    recipe: Recipe,
    adapter: Adapter,
    policy: Policy,
    processor: Processor,
    report: Progress,
    tell: Tell,
) -> Schedule | None:
    """The schedule of a method that needs one: a file's, or calibrated now."""
    spec = recipe.spec
    if policy.entry_tokens(adapter.shape, spec.cr) is None:
        if recipe.schedule is not None:
            raise SpecError(f"method {spec.method} follows no schedule; leave out --schedule")
        return None
    if recipe.schedule is not None:
        return read_schedule(recipe.schedule, adapter.shape, spec.cr)
    request = replace(_calibration(recipe), work=beside(recipe.folder))
    return calibrate(request, adapter, policy, processor, report, tell=tell)


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


def _settled(recipe: Recipe, work: Work) -> Settled:
    """Encoder and schedule, chosen together."""
    if recipe.ttft is not None and recipe.profile is not None:
        return within_time(work, recipe.profile, recipe.encoder, recipe.ttft, recipe.lowering)
    return within_operations(work, recipe.encoder, recipe.spec.cr)


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


def _check_keep(recipe: Recipe, why: str) -> None:
    """SpecError where parts are to stay in float32 and none can, or none can be found."""
    if recipe.keep_fp32 == "none":
        return
    dtype = recipe.lowering.dtype.name
    if dtype != "fp16":
        raise SpecError(f"--keep-fp32 is for fp16, this export is {dtype}; leave it out")
    if why:
        raise SpecError(
            f"--keep-fp32 auto measures on the samples of the parity check, which is {why}; give"
            " --parity N"
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
