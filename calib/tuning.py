"""What calibration samples say of the weights that a bundle quantises: their scales, kinds and
codes, and how large the inputs of their products are."""

from __future__ import annotations

from dataclasses import replace

from edgeprune.calib import awq, gptq, sensitivity, smoothing
from edgeprune.calib.calibrate import CalibrationRequest, samples_of
from edgeprune.calib.samples import answered
from edgeprune.errors import SpecError
from edgeprune.lowering import Lowering
from edgeprune.models import Adapter
from edgeprune.models._input_scales import own_peaks
from edgeprune.models._processor import Processor
from edgeprune.models._rounding import TORCH
from edgeprune.models._tuning import UNTUNED, Tuning
from edgeprune.policies import Policy
from edgeprune.progress import Progress, silent
from edgeprune.spec import Plan
from edgeprune.weight_format import AUTO, GPTQ

MOST_SAMPLES = 32
"""Samples at most: each has hundreds of tokens."""

MOST_MEASURED = 4
"""Samples at most on which each group of products is measured: each costs a layer of a prefill."""


def own_tuning(lowering: Lowering, adapter: Adapter) -> Tuning | None:
    """How large the inputs of products are by the scales that the checkpoint stores for them; None
    where it has none, or where samples are to say more."""
    wanted = lowering.weights
    if not lowering.calibrated or wanted.measured or wanted.kind != "fp8":
        return None
    peaks = own_peaks(adapter.with_weights(wanted, TORCH[lowering.dtype.name]))
    return Tuning(peaks=peaks, own_peaks=True) if peaks else None


def check_samples(lowering: Lowering, adapter: Adapter, given: bool) -> None:
    """SpecError where samples are to say which weights count, and none are given."""
    wanted = lowering.weights
    if given or not lowering.measured or own_tuning(lowering, adapter) is not None:
        return
    option = ":awq=on" if wanted.awq else ":activations=on" if wanted.activations else ""
    option += ":round=gptq" if wanted.round == GPTQ else ""
    other = "" if lowering.calibrated or not wanted.smooth else ", or export with smooth=off"
    raise SpecError(
        f"--weights {wanted.kind}{option} measures on samples; give images and questions with"
        f" --samples-file{other}"
    )


def check_bits(lowering: Lowering, adapter: Adapter) -> None:
    """SpecError where auto's bits are fewer than any choice of kinds takes."""
    if lowering.weights.kind == AUTO:
        scales, fused = TORCH[lowering.dtype.name], lowering.target.fused
        sensitivity.check_budget(adapter, lowering.weights, scales, fused=fused)


def tune(
    request: CalibrationRequest,
    lowering: Lowering,
    adapter: Adapter,
    policy: Policy,
    plan: Plan,
    processor: Processor,
    report: Progress = silent,
) -> Tuning:
    """What the samples of a request say of the weights; UNTUNED where the lowering asks none."""
    if not lowering.measured:
        return UNTUNED
    if (own := own_tuning(lowering, adapter)) is not None:
        return own
    wanted, dtype, tuning = lowering.weights, TORCH[lowering.dtype.name], UNTUNED
    some = replace(request, samples=min(request.samples, MOST_SAMPLES))
    prompts = [sample.prompt for sample in samples_of(some, adapter, processor)]
    if wanted.awq:
        four = adapter.with_weights(wanted.settled("int4"), dtype)
        tuning = awq.tune(four, policy, plan, prompts, report)
    if wanted.activations:
        return smoothing.tune(
            adapter.with_weights(wanted, dtype),
            policy,
            plan,
            prompts,
            report,
            smooth=wanted.smooth,
            calibrated=lowering.calibrated,
        )
    if wanted.kind == AUTO:
        few = replace(request, samples=min(request.samples, MOST_MEASURED))
        measured = [
            answered(sample, processor, sensitivity.ANSWER)
            for sample in samples_of(few, adapter, processor)
        ]
        given = adapter, wanted, dtype, policy, plan, measured, tuning, report
        tuning = replace(tuning, kinds=sensitivity.mix(*given, fused=lowering.target.fused))
    if wanted.round == GPTQ:
        rounded = adapter.with_weights(wanted, dtype, tuning)
        tuning = gptq.tune(rounded, policy, plan, prompts, report)
    return tuning
