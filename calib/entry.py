"""What is lost where fewer visual tokens enter the decoder than the dense encoder gives.

A schedule prices what leaves behind a layer by that layer's attention. Before layer 1 there is
none to price with, so the loss is measured: for some counts, the mean angle by which the output
turns where so many tokens enter layer 1, chosen by the method's own site there, and nothing is
pruned behind. It is the angle that an encoder's loss is counted in (`encoder_loss.py`).
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from edgeprune.calib.calibrate import (
    CalibrationRequest,
    encoder_key,
    evidence_key,
    samples_of,
    write_cached,
)
from edgeprune.calib.encoder import MOST, chooses, level_plan
from edgeprune.calib.encoder_loss import angle, features
from edgeprune.calib.schedule import Evidence
from edgeprune.calib.solvers._problem import Floats, Ints, Problem
from edgeprune.models import Adapter
from edgeprune.models._layerwise import Layerwise
from edgeprune.models._processor import Processor
from edgeprune.policies import Policy, make
from edgeprune.progress import Progress, silent
from edgeprune.spec import ModelShape, PruneSpec
from edgeprune.timing import monotone

SHARES = 1 / 2, 1 / 4, 1 / 8, 1 / 16
"""Of the tokens that the encoder gives: counts that are measured, beside the least there may be."""
ENTRY = 1
"""Raised where it is measured in another way."""


@dataclass(frozen=True)
class EntryLoss:
    """The loss by how many tokens enter layer 1."""

    counts: tuple[int, ...]  # that were measured, rising; the last is all that the encoder gives
    angles: tuple[float, ...]  # radians, mean over samples; they never rise, the last is 0

    @property
    def least(self) -> int:
        return self.counts[0]

    def by_count(self, tokens: int) -> Floats:
        """Beyond what `tokens` lose, where 0 .. tokens enter: [tokens + 1]. Between two counts that
        were measured on the line through them."""
        every = np.interp(np.arange(tokens + 1), self.counts, self.angles)
        found: Floats = every - every[-1]
        return found


def measure_entry(
    request: CalibrationRequest,
    adapter: Adapter,
    processor: Processor,
    policy: Policy,
    report: Progress = silent,
) -> EntryLoss | None:
    """What a model loses by its entry, its encoder as it is; None where the method cannot choose
    before layer 1. Kept in the cache."""
    if not chooses(adapter, policy):
        return None
    stored = request.folder / f"{evidence_key(request, adapter, policy)}-entry{ENTRY}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # not there, or damaged
        kept = json.loads(stored.read_text())
        return EntryLoss(tuple(kept["counts"]), tuple(kept["angles"]))
    prompts = [one.prompt for one in samples_of(request, adapter, processor)][:MOST]
    counts = counts_of(adapter.shape)
    step = _step(report, "entry, all tokens")
    whole = features(adapter, prompts, step, policy)
    angles = [0.0]
    for number, count in enumerate(reversed(counts[:-1]), 1):
        step = _step(report, f"entry {number} of {len(counts) - 1}")
        plan = level_plan(adapter.shape, policy, count)
        angles.append(angle(features(adapter, prompts, step, policy, plan), whole))
    found = EntryLoss(counts, monotone(angles)[::-1])
    write_cached(stored, json.dumps(asdict(found)).encode())
    return found


def counts_of(shape: ModelShape) -> tuple[int, ...]:
    """Counts of tokens that enter layer 1 to be measured, rising; all that the encoder gives are
    the last. Tokens that a model puts between tiles always enter."""
    least, tokens = shape.separators + 1, shape.encoded
    some = (max(least, round(share * tokens)) for share in SHARES)
    return tuple(sorted({least, tokens, *some}))


def pose(evidence: Evidence, entry: EntryLoss | None) -> Problem:
    """The problem of a budget of time: with r_1 open where the loss of fewer is known."""
    attention, loss = evidence.attention, evidence.loss
    _, layers, tokens = attention.shape
    if entry is None or evidence.entry is None:
        return Problem.pose(attention, loss, None, tokens, tokens * layers)
    lost = entry.by_count(tokens)
    return Problem.pose_open(attention, loss, evidence.entry, lost, min(entry.least, tokens))


def behind_drop(evidence: Evidence, left: Ints) -> Evidence:
    """What the dense encoder's evidence says of the tokens that a shorter one leaves, `left` [S, n]
    of the V; what the others were given is theirs in proportion."""
    attention = np.take_along_axis(evidence.attention, left[:, None], -1)
    entry = evidence.entry
    entry = None if entry is None else np.take_along_axis(entry, left, -1)
    return Evidence(attention, evidence.loss, entry, evidence.sample_ids)


@torch.no_grad()
def left_tokens(
    request: CalibrationRequest,
    adapter: Adapter,
    processor: Processor,
    policy: Policy,
    report: Progress = silent,
) -> Ints:
    """Indices among the V of the visual tokens that an encoder leaves on each sample, rising:
    [S, n]. Only the encoder runs. Kept in the cache."""
    stored = request.folder / f"{encoder_key(request, adapter, policy)}-left.npz"
    if (kept := _load(stored)) is not None:
        return kept
    plan = policy.unpruned(adapter.shape)
    engine = Layerwise(adapter, make(PruneSpec("none")), plan, _step(report, "tokens left"))
    run, vision, found = engine.execution.run, engine.vision, list[np.ndarray]()
    for started in engine.start(one.prompt for one in samples_of(request, adapter, processor)):
        _, indices = run(vision.select, started.encoded)
        found.append(indices.cpu().numpy())
    left = np.stack(found).astype(np.intp)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, left=left)
    write_cached(stored, buffer.getvalue())
    return left


def _load(file: Path) -> Ints | None:
    """What was measured before; None where nothing was, or where the file is damaged."""
    if file.is_file():
        with suppress(Exception), np.load(file, allow_pickle=False) as data:
            left: Ints = data["left"].astype(np.intp)
            return left
    return None


def _step(report: Progress, title: str) -> Callable[[int, int], None]:
    return lambda done, total: report(title, done, total)
