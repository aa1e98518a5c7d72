"""How inputs of products are rounded to 8 bits: their scale, and what is done before so that one
scale suits all channels, as in SmoothQuant (arXiv:2211.10438).

s_k = sqrt(max(|x_k|) / max(|w_k|)) for input channel k of the products that read one tensor, w_k
being the weights of all of them. Inputs are divided by s, weights multiplied: what is large in few
channels of the inputs moves into weights, where each output has a scale of its own. The division
is folded into the tensor's source, so that the graph does not change.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from edgeprune.calib.activations import Moments, collect, peaks
from edgeprune.calib.awq import LEAST, Group, groups_of, normalised
from edgeprune.errors import ModelError
from edgeprune.models import Adapter
from edgeprune.models._memory import check_memory, layerwise_bytes
from edgeprune.models._processor import Prompt
from edgeprune.models._tuning import Fold, Tuning
from edgeprune.models._weight_plan import WeightPlan
from edgeprune.models._weight_source import Source
from edgeprune.policies import Policy
from edgeprune.progress import Progress, silent
from edgeprune.spec import Plan


def tune(
    adapter: Adapter,
    policy: Policy,
    plan: Plan,
    prompts: Sequence[Prompt],
    report: Progress = silent,
    *,
    smooth: bool,
    calibrated: bool,
) -> Tuning:
    """Folds, where channels are to be smoothed, and the largest input of each product, where scales
    are to be `calibrated`, for the products whose inputs `adapter.weights` rounds.

    ModelError where the checkpoint's weights are quantised already and would be scaled.
    """
    assert adapter.weights is not None
    if smooth and adapter.checkpoint.packed is not None:
        raise ModelError(
            "smooth=on needs the floats of a checkpoint, and this one's weights are quantised"
            f" ({adapter.checkpoint.packed}); export with smooth=off"
        )
    floats = adapter.without_weights()
    check_memory(layerwise_bytes(floats, len(prompts)), "activations=on", "leave it out")
    moments = collect(floats, policy, plan, prompts, report)
    folds: dict[str, Fold] = defaultdict(Fold)
    sources = adapter.sources(adapter.empty_modules()[1])
    groups = [one for one in groups_of(adapter.decoder_config) if _rounds(one, adapter.weights)]
    for group in groups if smooth else ():
        scales = _scales(group, adapter, sources, moments)
        for name in group.products:
            folds[name] = Fold(scales, folds[name].outputs)
        for name in (name for name in group.source if name in sources):
            folds[name] = Fold(folds[name].inputs, group.of_source(scales))
    return Tuning(dict(folds), peaks=peaks(moments, folds) if calibrated else {})


def _rounds(group: Group, weights: WeightPlan) -> bool:
    """Whether the inputs of all its products are rounded, and something takes scales."""
    forms = (weights.forms.get(name) for name in group.products)
    return bool(group.source) and all(form is not None and form.activations for form in forms)


def _scales(
    group: Group, adapter: Adapter, sources: Mapping[str, Source], moments: Mapping[str, Moments]
) -> Tensor:
    """s of the inputs of a group: [K]."""
    inputs = torch.stack([torch.as_tensor(moments[one].largest) for one in group.products]).amax(0)
    strips = (part for name in group.products for _, part in adapter.reader.floats(sources[name]))
    weights = torch.stack([part.abs().amax(1) for part in strips]).amax(0)
    found = _positive(group.largest(inputs)) / _positive(group.largest(weights))
    return normalised(found.sqrt())


def _positive(channels: Tensor) -> Tensor:
    return channels.clamp(min=LEAST * float(channels.max()) or 1.0)
