"""What quantising weights costs: bits, the error of the weights, and the distance of the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from edgeprune.export import precision
from edgeprune.export.comparison import Models
from edgeprune.export.dialogue import Graphs
from edgeprune.export.parity import WEIGHTS
from edgeprune.export.weights import Stored
from edgeprune.graphs import GraphRecord
from edgeprune.lowering import Lowering
from edgeprune.measured import WeightsRecord
from edgeprune.models import Adapter
from edgeprune.models._dialogues import Outcome
from edgeprune.models._eager import Eager
from edgeprune.models._rounded_inputs import round_inputs
from edgeprune.models._tuning import Tuning


def weights_record(
    lowering: Lowering, stored: Stored, kinds: Mapping[str, str]
) -> WeightsRecord | None:
    """How the weights of a bundle were stored, of which `kinds` were chosen one by one; None where
    none is quantised."""
    if not stored.numbers:
        return None
    return WeightsRecord(
        format=str(lowering.weights),
        algorithm=lowering.weights.algorithm,
        tensors=dict(stored.tensors),
        packed=stored.packed,
        own=stored.own,
        zero_points=stored.shifted,
        numbers=stored.numbers,
        bits=8 * stored.bytes / stored.numbers,
        kinds=dict(kinds),
        error=math.sqrt(stored.error / stored.power) if stored.power else 0.0,
    )


def weights_notes(lowering: Lowering, stored: Stored, tuning: Tuning) -> tuple[str, ...]:
    """What became of weights that the checkpoint stores in a quantised form, and which products are
    left to be rounded to nearest, for people."""
    if left := tuning.left:
        kinds = sorted({".".join(name.split(".")[2:-1]) for name in left})
        return (
            f"round=gptq: {len(left)} products have too many inputs and are rounded to nearest"
            f" ({', '.join(kinds)})",
        )
    if not stored.packed:
        return ()
    dtype, anew = lowering.dtype.name, stored.packed - stored.own
    if lowering.weights.is_float:
        done = f"are written as floats ({dtype}); --weights keeps them small"
    elif not anew:
        done = "keep their codes"
    else:
        done = f"are rounded anew, {anew} of them: not of the bits or blocks of --weights"
    if stored.shifted:
        how = "" if lowering.target.zero_points else " in a second product of sums of blocks"
        done += f"; {stored.shifted} have zero points{how}"
    if tuning.own_peaks:
        done += "; the inputs of products are rounded with the checkpoint's own scales"
    return (f"the checkpoint's {stored.packed} quantised weights {done}",)


def weigh(
    weights: WeightsRecord | None,
    lowering: Lowering,
    exact: Adapter,  # with the checkpoint's own weights
    draft: Path,
    records: Mapping[str, GraphRecord],
    models: Models,  # with the weights of the bundle
) -> WeightsRecord | None:
    """The record with distances to the model whose weights are not quantised."""
    if weights is None:
        return None
    plan, samples, report = models.plan, models.samples, models.report
    own = Eager(exact, models.policy, plan)
    wanted = own.outcomes(samples, partial(report, "the model before quantising"))
    precision.require_all_finite(wanted, "the float32 model", WEIGHTS)

    def apart(found: Sequence[Outcome]) -> precision.Tally:
        precision.require_all_finite(found, "the quantised model", "choose another --weights")
        return precision.Tally.of(found, wanted, plan)

    weights = replace(weights, distance=apart(models.exact).record())
    activations, dtype = lowering.weights.activations, lowering.dtype.name
    if not activations and (lowering.target.codes != "MatMulNBits" or dtype == "bf16"):
        return weights
    wide = activations and dtype != "fp32"  # with the same codes and scales
    graphs = Graphs(draft, records, models.rounded(), exact=False, wide=wide)
    running = apart(graphs.outcomes(samples, partial(report, "distance as the graph runs")))
    weights = replace(weights, running=running.record())
    if not activations:
        return weights
    eager, plans = Eager(models.adapter, models.policy, plan), models.adapter.weights
    assert plans is not None
    round_inputs(plans, eager.vision.vision, eager.decoder.decoder)
    rounded = apart(eager.outcomes(samples, partial(report, "distance of rounded activations")))
    precision.require_no_farther(running, rounded, f"activations of {lowering.weights.kind}")
    return replace(weights, rounded=rounded.record())
