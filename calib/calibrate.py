"""`calibrate`: samples to evidence to a schedule, each kept in a cache and made only once."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from edgeprune import __version__
from edgeprune.calib.collect import Run, collect
from edgeprune.calib.resuming import Tell, WorkFolder, quiet
from edgeprune.calib.samples import Sample, check_image_dir, demo_samples, user_samples
from edgeprune.calib.schedule import Evidence, Schedule, read_schedule, solve
from edgeprune.calib.solvers import _problem as solvers
from edgeprune.calib.solvers._problem import Goal
from edgeprune.errors import ScheduleError, SpecError
from edgeprune.files import write_whole
from edgeprune.models import Adapter
from edgeprune.models._memory import (
    activation_bytes,
    check_device,
    check_memory,
    layerwise_bytes,
)
from edgeprune.models._processor import Processor
from edgeprune.policies import Policy
from edgeprune.progress import Progress, silent

CACHE = "EDGEPRUNE_CACHE"
EVIDENCE = 2
"""Raised where images are read, or prompts written, in another way: old evidence is made anew."""
WORK = 1
"""Likewise of what is kept between two layers."""
ENCODER = 1
"""Likewise of what is measured of the encoder."""
SEARCH = 4
"""Raised where schedules are searched for, or bounded, in another way."""
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "qwen.tiktoken"),
)
PROMPT_FILES = (
    *("chat_template.jinja", "chat_template.json"),
    *("preprocessor_config.json", "processor_config.json"),
)
"""Files of a checkpoint, beside the weights and the tokenizer, that decide what a sample is."""


Measure = Callable[[Progress], Evidence]
"""Makes the evidence of a request's samples, telling how far it is."""


@dataclass(frozen=True)
class CalibrationRequest:
    """Which samples, how many, and which solver; no file means generated scenes, for the demo."""

    cr: float
    samples: int = 100
    file: Path | None = None
    image_dir: Path | None = None  # where the images of `file` are; None: beside it
    solver: str = "joint"
    max_sites: int | None = None  # layers at most where the count falls
    solve_seconds: float | None = None  # of the search for a bound; None: by the problem's size
    patient: bool = False  # whether Ctrl-C ends that search alone
    work: Path | None = None  # folder by which a calibration that was killed goes on
    cache: Path | None = None  # default: EDGEPRUNE_CACHE, or ~/.cache/edgeprune

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise SpecError(f"--samples is at least 1; got {self.samples}")
        check_image_dir(self.image_dir, self.file)
        if self.max_sites is not None and (self.solver != "joint" or self.max_sites < 1):
            raise SpecError(
                f"--max-sites is at least 1 and needs --solver joint; got {self.max_sites} with"
                f" {self.solver}"
            )

        if self.solve_seconds is not None and not 0 <= self.solve_seconds < math.inf:
            raise SpecError(f"--solve-seconds is 0 or more; got {self.solve_seconds:g}")

    @property
    def goal(self) -> Goal:
        return Goal(seconds=self.solve_seconds, patient=self.patient)

    @property
    def folder(self) -> Path:
        default = os.environ.get(CACHE) or "~/.cache/edgeprune"
        return (self.cache or Path(default)).expanduser()


def calibrate(
    request: CalibrationRequest,
    adapter: Adapter,
    policy: Policy,
    processor: Processor,
    report: Progress = silent,
    measure: Measure | None = None,
    tell: Tell = quiet,
) -> Schedule:
    """The schedule of a policy for a model; read from the cache where it was solved before.

    `measure` makes the evidence elsewhere; None: here. `tell` is told of the work folder.
    """
    first = policy.entry_tokens(adapter.shape, request.cr)
    if first is None:
        raise SpecError("this method's counts need no calibration; export it as it is")
    key = evidence_key(request, adapter, policy)
    sites = f"-sites{request.max_sites}" if request.max_sites else ""
    limit = "" if request.solve_seconds is None else f"-{request.solve_seconds:g}s"
    how = f"{request.solver}{SEARCH}{sites}{limit}"
    stored = request.folder / f"{key}-cr{request.cr:g}-{how}.json"
    if stored.is_file():
        with suppress(ScheduleError):  # damaged: solve again
            return read_schedule(stored, adapter.shape, request.cr)
    evidence = evidence_of(request, adapter, policy, processor, report, measure, tell)
    report("solve schedule", 0, 1)
    schedule = solve(
        evidence,
        cr=adapter.shape.ratio_behind(request.cr),
        first=first,
        solver=request.solver,  # type: ignore[arg-type]
        max_sites=request.max_sites,
        convolutions=adapter.shape.convolutions,
        goal=request.goal,
        progress=shown(report),
    )
    write_cached(stored, schedule.to_json().encode())
    return schedule


def shown(report: Progress) -> solvers.Progress:
    """A solver's progress, told as percent of the objective that is proven."""

    def tell(step: str, objective: float, bound: float) -> None:
        share = 100 * bound / objective if 0 < objective < math.inf else 0
        report(f"solve, {objective:.4g} rad, {step}", int(share), 100)

    return tell


def evidence_of(
    request: CalibrationRequest,
    adapter: Adapter,
    policy: Policy,
    processor: Processor,
    report: Progress = silent,
    measure: Measure | None = None,
    tell: Tell = quiet,
) -> Evidence:
    """What a model does on the samples; read from the cache where it was measured before."""
    stored = request.folder / f"{evidence_key(request, adapter, policy)}.npz"
    if stored.is_file():
        with suppress(Exception):  # damaged in any way; zipfile raises many kinds: measure again
            return _load(stored)
    if measure is not None:
        evidence = measure(report)
        _save(stored, evidence)
        return evidence
    need, work = check_room(adapter, request.samples), _work(request, adapter, policy, tell)
    evidence = collect(
        adapter,
        policy,
        samples_of(request, adapter, processor),
        lambda done, total: report(f"calibrate in {need / 1e9:.1f} GB", done, total),
        work=work,
    )
    _save(stored, evidence)
    if work is not None:
        work.remove()
    return evidence


def _work(
    request: CalibrationRequest, adapter: Adapter, policy: Policy, tell: Tell
) -> WorkFolder | None:
    """Where finished layers are kept, under all that decides what they give."""
    if request.work is None:
        return None
    key = f"{evidence_key(request, adapter, policy)} {WORK} {torch.__version__}"
    work = WorkFolder(request.work, key, Run, tell)
    work.make_room(2 * activation_bytes(adapter, request.samples))
    return work


def check_room(adapter: Adapter, count: int) -> int:
    """Bytes that so many samples take; an error before any work where they are not free."""
    need = layerwise_bytes(adapter, count)
    check_memory(need, "calibration", "make a schedule on a larger machine: edgeprune calibrate")
    check_device(adapter, "calibration")
    return need


def samples_of(
    request: CalibrationRequest, adapter: Adapter, processor: Processor
) -> Iterator[Sample]:
    """The user's samples, or the demo's own scenes; SpecError where there are none."""
    if request.file is not None:
        images = request.image_dir or request.file.parent
        return user_samples(processor, request.file, images, request.samples)
    from edgeprune.demo import MODEL_DIR

    if adapter.checkpoint.folder.resolve() != MODEL_DIR.resolve():
        raise SpecError(
            "this method calibrates on images with questions: give --samples-file FILE (LLaVA-"
            "Instruct JSON) and --image-dir DIR, or a finished --schedule FILE"
        )
    return demo_samples(processor, request.samples)


def evidence_key(request: CalibrationRequest, adapter: Adapter, policy: Policy) -> str:
    """Names evidence by all that it depends on: weights, what a prompt shows, method with options,
    samples, and this version of edgeprune."""
    site = adapter.vision_config.site
    return _key(
        request,
        adapter,
        f"evidence {EVIDENCE}",
        f"{type(policy).__module__}:{policy}",
        f"encoder {site.method if site else 'dense'}",
    )


def encoder_key(request: CalibrationRequest, adapter: Adapter, policy: Policy) -> str:
    """Names what was measured of the model's encoder likewise; where it drops tokens, positions of
    the others are the policy's."""
    site, shape = adapter.vision_config.site, adapter.shape
    positions = f"{policy.unpruned(shape).stages}" if shape.after_encoder else ""
    return _key(request, adapter, f"encoder {ENCODER}", f"{site and site.method}{positions}")


def _key(request: CalibrationRequest, adapter: Adapter, *what: str) -> str:
    """A hash of the weights, what a prompt shows, samples, this version, and `what` else."""
    folder, tokenizer = adapter.checkpoint.folder, adapter.checkpoint.text_folder
    parts = [__version__, adapter.checkpoint.fingerprint(), str(adapter.execution), *what]
    parts += [f"{name} {_digest(folder / name)}" for name in PROMPT_FILES]
    parts += [f"{name} {_digest(tokenizer / name)}" for name in TOKENIZER_FILES]
    parts.append(f"{adapter.pixels} {adapter.tiling} {adapter.asked}")
    parts.append(f"{request.samples} of {_samples_fingerprint(request)}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "none"


def _samples_fingerprint(request: CalibrationRequest) -> str:
    if request.file is None:
        return "demo"
    try:
        content = hashlib.sha256(request.file.read_bytes()).hexdigest()
    except OSError as error:
        raise SpecError(
            f"--samples-file {request.file} cannot be read: {error.strerror}"
        ) from error
    return f"{content} in {(request.image_dir or request.file.parent).resolve()}"


def _load(file: Path) -> Evidence:
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as data:
        ids = tuple(str(name) for name in data["ids"])
        return Evidence(data["attention"], data["loss"], data["entry"], ids)


def _save(file: Path, evidence: Evidence) -> None:
    import io

    buffer = io.BytesIO()
    entry = evidence.entry if evidence.entry is not None else np.zeros(0)
    np.savez_compressed(
        buffer,
        attention=evidence.attention,
        loss=evidence.loss,
        entry=entry,
        ids=np.array(evidence.sample_ids),
    )
    write_cached(file, buffer.getvalue())


def write_cached(file: Path, data: bytes) -> None:
    """A cache that cannot be written is no reason to fail."""
    with suppress(SpecError):
        write_whole(file, data)
