"""What UTR needs to know of a model: where the last prompt token looks, and what each layer loses.

For each sample, one full forward collects a^l, the attention of layer l to each visual token, and L
- 1 text-only continuations give ell_l: how far the output turns when layers l .. L see no visual
token. A layer without attention is given that of the last layer before it that has some, by which
its tokens were chosen. A continuation needs only the text tokens' hidden states of the full
forward, and all of them that have begun run as one batch, so the whole costs about 1.6 prefills and
not L. All samples go through one layer before the next layer is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from edgeprune.calib.resuming import Collected, WorkFolder
from edgeprune.calib.samples import Sample
from edgeprune.calib.schedule import Evidence
from edgeprune.errors import ModelError
from edgeprune.models import Adapter
from edgeprune.models._activations import Activations, Kept
from edgeprune.models._decoder import Flow
from edgeprune.models._layerwise import Layerwise, Started
from edgeprune.models._processor import Prompt
from edgeprune.models._rounding import NAMES, WIDER
from edgeprune.policies import Policy
from edgeprune.policies._signals import LayerSignals, Segments


@dataclass(frozen=True)
class Run:
    """One sample between two layers: the full forward, and the continuations without vision."""

    flow: Flow
    text: Tensor  # [l - 1, P + T, width]: hidden states where layers 2 .. l, each by itself, began
    slots: Tensor  # int64 [P + T], where the text is among the tokens of the full forward
    rows: Tensor  # int64 [1, P + T], of the rotary tables, at the text's true positions


@torch.no_grad()
def collect(
    adapter: Adapter,
    policy: Policy,
    samples: Iterable[Sample],
    report: Callable[[int, int], None] = lambda done, total: None,
    activations: Activations | None = None,
    work: WorkFolder | None = None,
) -> Evidence:
    """Run the model over samples, nothing pruned behind its encoder: attention [S, L, V], loss
    [S, L], [CLS] scores [S, V], with V the visual tokens that the encoder gives.

    It computes where and in which dtype the adapter says; scores and angles are float32 always.
    ModelError where a number is not finite. Where `work` says so, it goes on at a finished layer.
    `report` is told how often a sample went through a layer, and how often it will.
    """
    plan = policy.unpruned(adapter.shape)
    dtype, run = adapter.execution.dtype, adapter.execution.run
    engine = Layerwise(adapter, policy, plan, report, dtype=dtype, activations=activations)
    ids, entry = list[str](), list[np.ndarray]()

    def prompts() -> Iterator[Prompt]:
        for sample in samples:
            ids.append(sample.id)
            yield sample.prompt

    def begun(started: Started) -> Run:
        # its salience decides the tokens that enter layer 1 above CR 4
        scores = engine.vision.entry_scores(started.encoded)
        if scores is not None:
            entry.append(_finite(scores, adapter, "the encoder"))
        return _begun(engine, started)

    attention: list[list[np.ndarray]] = [[] for _ in range(plan.layers)]
    before = work.last() if work else None
    if before is None:
        runs, first = engine.keep(run(begun, one) for one in engine.start(prompts())), 0
    else:
        runs, first = engine.keep(before.runs), before.layers
        ids += before.collected.ids
        entry += [scores.numpy() for scores in before.collected.entry]
        for index, layer in enumerate(before.collected.attention):
            attention[index] += list(layer.numpy())

    def finished(layers: int, runs: Kept[Run]) -> None:
        if work is not None:
            done = tuple(torch.from_numpy(np.stack(layer)) for layer in attention[:layers])
            entered = tuple(torch.from_numpy(scores) for scores in entry)
            work.save(layers, Collected(tuple(ids), entered, done), runs)

    def scores(index: int, signals: LayerSignals) -> np.ndarray:
        if index + 1 not in adapter.shape.convolutions:
            found = policy.calibration_scores(index + 1, signals)
            return _finite(found, adapter, f"decoder layer {index}")
        if index:
            return attention[index - 1][len(attention[index])]  # of the same sample
        return np.full(plan.entering, 1 / plan.entering, np.float32)  # drops nothing

    def step(index: int, run: Run) -> Run:
        text = run.text
        if index > 0:
            text = torch.cat([text, run.flow.hidden.index_select(1, run.slots)])  # one more begins
            prefix = run.flow.segments.prefix
            alone = Segments(prefix, 0, text.shape[1] - prefix)
            text = engine.continued(index, text, run.rows, alone)
        done = engine.advance(index, run.flow)
        attention[index].append(scores(index, done.signals))
        return Run(done.flow, text, run.slots, run.rows)

    runs = engine.layers(runs, step, first, finished)
    ends = (run(partial(_loss, engine), one) for one in engine.normed(runs.drain()))
    loss = [_finite(angles, adapter, "the last decoder layer") for angles in ends]
    by_sample = np.stack([np.stack(layer) for layer in attention], axis=1)
    entered = np.stack(entry) if entry else None
    return Evidence(by_sample, np.stack(loss), entered, tuple(ids))


def _begun(engine: Layerwise, started: Started) -> Run:
    decoder = engine.decoder
    prefix, text = started.prefix_ids.shape[1], started.text_ids.shape[1]
    before, after = torch.arange(prefix), torch.arange(prefix, prefix + text)
    positions = torch.cat([before, after + decoder.span])
    return Run(
        flow=started.flow,
        text=started.flow.hidden.new_empty(0, prefix + text, decoder.config.width),
        slots=torch.cat([before, after + decoder.plan.entering]),
        rows=decoder.rows(positions, positions[-1:])[None],
    )


def _finite(values: Tensor, adapter: Adapter, where: str) -> np.ndarray:
    """Values as they are kept, float32; ModelError unless all are finite."""
    kept: np.ndarray = values.float().cpu().numpy()
    if not np.isfinite(kept).all():
        dtype = adapter.execution.dtype
        wider = WIDER.get(dtype, "").replace("--dtype", "--reference-dtype")
        advice = f"calibrate with {wider}" if wider else "check the checkpoint's weights"
        raise ModelError(
            f"the model in {NAMES[dtype]} gives numbers that are not finite in {where}; {advice}"
        )
    return kept


def _loss(engine: Layerwise, run: Run) -> Tensor:
    """The angle between output features of the last token with vision and without, by the layer
    from which on there is none: float32 [L], radians; that of layer 1 is not used."""
    norm = engine.decoder.norm
    full, without = (norm(hidden[:, -1]).float() for hidden in (run.flow.hidden, run.text))
    cosine = torch.cosine_similarity(without, full)
    return torch.cat([torch.zeros(1), cosine.clamp(-1, 1).acos()])
