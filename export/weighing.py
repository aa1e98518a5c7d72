"""What quantising weights costs: bits, the error of the weights, and the distance of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from edgeprune.bundle import WeightsRecord
from edgeprune.export import precision
from edgeprune.export.dialogue import Graphs, Outcome, play, require_finite
from edgeprune.export.parity import WEIGHTS
from edgeprune.export.upcast import upcast
from edgeprune.export.weights import Stored
from edgeprune.graphs import GraphRecord
from edgeprune.lowering import Lowering
from edgeprune.models import Adapter
from edgeprune.models._processor import Prompt
from edgeprune.models._reference import Reference
from edgeprune.models._rounded_inputs import round_inputs
from edgeprune.models._rounding import TORCH
from edgeprune.policies import Policy
from edgeprune.progress import Progress
from edgeprune.spec import Plan

Wanted = list[tuple[Outcome, torch.Tensor]]  # of each sample, with the first decode step's token


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
        numbers=stored.numbers,
        bits=8 * stored.bytes / stored.numbers,
        kinds=dict(kinds),
        error=math.sqrt(stored.error / stored.power) if stored.power else 0.0,
    )


def weights_notes(lowering: Lowering, stored: Stored) -> tuple[str, ...]:
    """What became of weights that the checkpoint stores in a quantised form, for people."""
    if not stored.packed:
        return ()
    dtype, anew = lowering.dtype.name, stored.packed - stored.own
    if lowering.weights.is_float:
        done = f"are written as floats ({dtype}); --weights keeps them small"
    elif not anew:
        done = "keep their codes"
    else:
        done = f"are rounded anew, {anew} of them: not of the bits or blocks of --weights"
        done += "" if lowering.target.zero_points else ", or with zero points"
    return (f"the checkpoint's {stored.packed} quantised weights {done}",)


def weigh(
    weights: WeightsRecord | None,
    lowering: Lowering,
    exact: Adapter,  # with the checkpoint's own weights
    draft: Path,
    record: GraphRecord,  # of decoder.onnx
    adapter: Adapter,  # with the weights of the bundle
    policy: Policy,
    plan: Plan,
    samples: Sequence[Prompt],
    report: Progress,
) -> WeightsRecord | None:
    """The record with distances to the model whose weights are not quantised."""
    if weights is None:
        return None
    model = Reference.build(exact, policy, plan)
    wanted, dtype = Wanted(), TORCH[lowering.dtype.name]
    for number, prompt in enumerate(samples, 1):
        wanted.append(play(model, prompt))
        require_finite(wanted[-1][0], "the float32 model", number, WEIGHTS)
        report("the model before quantising", number, len(samples))
    del model
    quantised = Reference.build(adapter, policy, plan)

    def apart(engine: Reference | Graphs, step: str) -> precision.Tally:
        tick = _ticking(report, step, len(samples))
        return _apart(engine, wanted, samples, plan, tick)

    found = replace(weights, distance=apart(quantised, "distance of quantised weights").record())
    activations = lowering.weights.activations
    if not activations and (lowering.target.codes != "MatMulNBits" or dtype == torch.bfloat16):
        return found
    with TemporaryDirectory(dir=draft) as copy:
        folder, runs = draft, dtype
        if activations and dtype != torch.float32:  # with the same codes and scales
            folder, runs = Path(copy), torch.float32
            upcast(draft, folder)
        graphs = Graphs(folder, record, quantised.decoder, runs, exact=False)
        running = apart(graphs, "distance as the graph runs")
        del graphs
    found = replace(found, running=running.record())
    if not activations:
        return found
    assert adapter.weights is not None
    round_inputs(adapter.weights, quantised.vision, quantised.decoder)
    rounded = apart(quantised, "distance of rounded activations")
    kind = lowering.weights.kind
    precision.require_no_farther(running, rounded, f"activations of {kind}")
    return replace(found, rounded=rounded.record())


def _ticking(report: Progress, step: str, count: int) -> Callable[[int], None]:
    return lambda done: report(step, done, count)


def _apart(
    engine: Reference | Graphs,
    wanted: Wanted,
    samples: Sequence[Prompt],
    plan: Plan,
    progress: Callable[[int], None],
) -> precision.Tally:
    """How far an engine is from what another said of the same samples."""
    tally = precision.Tally()
    for number, (prompt, (outcome, token)) in enumerate(zip(samples, wanted, strict=True), 1):
        found, _ = play(engine, prompt, token)
        require_finite(found, "the quantised model", number, "choose another --weights")
        tally.add(found, outcome, plan)
        progress(number)
    return tally
