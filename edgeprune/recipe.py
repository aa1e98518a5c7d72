"""A recipe: all that decides a bundle. `edgeprune/making.py` makes the bundle."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from edgeprune import encoder_methods, policies
from edgeprune.calib.samples import check_image_dir
from edgeprune.dial import check_ratios
from edgeprune.encoder_methods import DENSE
from edgeprune.errors import SpecError
from edgeprune.lowering import Lowering, resolve
from edgeprune.models._execution import Execution
from edgeprune.spec import PruneSpec
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
    def specs(self) -> list[PruneSpec]:
        """The method at each ratio that is asked for; one where counts are frozen."""
        return [replace(self.spec, cr=cr) for cr in self.ratios] or [self.spec]

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
