"""The range of float16: proven on samples, or refused by the name of what first leaves it.

Three runs of the eager model decide. In float32 every result's largest magnitude is measured. Where
parts may stay in float32 those are chosen whose magnitude comes near the limit, and the float32 run
is made again as the graph will compute. Last, in float16, rounded after each operator: it tells
which results are float16, and all of them must be finite. Each of those is held to the limit by its
float32 magnitude, since ONNX Runtime's CPU provider keeps float32 between many float16 nodes and
cannot show what a device does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from edgeprune.errors import ExportError
from edgeprune.measured import RangeRecord
from edgeprune.models import Adapter
from edgeprune.models._dialogues import Outcome
from edgeprune.models._eager import Eager
from edgeprune.models._layers import Sum
from edgeprune.models._processor import Prompt
from edgeprune.models._ranges import (
    CAST,
    RSQRT,
    Key,
    Peak,
    Peaks,
    ScoredOps,
    measure,
)
from edgeprune.policies import Policy
from edgeprune.progress import Progress, silent
from edgeprune.spec import Plan

LIMIT = torch.finfo(torch.float16).max

SAFETY = 4
"""Parts stay in float32 from a peak of LIMIT / SAFETY on: other images may reach further."""

TINY = 2.0**-24
"""The smallest positive number of float16."""

STREAM = ("residual", "output", "down", "attention_gain", "mlp_gain")
"""Parts of a layer whose result is, or is added to, the residual stream."""

TITLES = {"product": "gate * up", "scores": "attention scores"}


@dataclass(frozen=True)
class Proof:
    """What float16 holds of a model, notes, and what was made of the samples on the way."""

    record: RangeRecord
    notes: tuple[str, ...]
    exact: list[Outcome]  # in float32
    half: list[Outcome]


def prove(
    adapter: Adapter,
    policy: Policy,
    plan: Plan,
    prompts: Sequence[Prompt],
    keep: str,
    report: Progress = silent,
) -> Proof:
    """What float16 holds of a model; ExportError where it does not hold all.

    `keep` is `none` or `auto`: whether parts may stay in float32.
    """

    def measured(model: Eager, step: str) -> tuple[Peaks, list[Outcome]]:
        return measure(model, prompts, partial(report, step))

    exact = Eager(adapter, policy, plan, ops=ScoredOps())
    peaks, outcomes = measured(exact, "range in float32")
    chosen = _chosen(peaks, exact) if keep == "auto" else frozenset[str]()
    if chosen:
        exact.widen(chosen)
        peaks, _ = measured(exact, "range of what is left in float16")
    half = Eager(adapter, policy, plan, torch.float16, ops=ScoredOps(), wide=chosen)
    rounded, halves = measured(half, "range in float16")
    held = dict(_held(peaks, rounded))
    _require_finite(held, rounded, len(prompts), keep == "none", half)
    key, peak = max(held.items(), key=lambda item: item[1].value)
    record = RangeRecord(
        samples=len(prompts),
        limit=LIMIT,
        peak=peak.value,
        where=title(key),
        sample=peak.sample,
        margin=LIMIT / max(peak.value, TINY),
        float32=tuple(path for path in half.parts if path in chosen),
    )
    return Proof(record, tuple(_notes(record, peaks, keep)), outcomes, halves)


def _chosen(peaks: Peaks, reference: Eager) -> frozenset[str]:
    """The parts that read or give what comes near the limit, and the residual stream from the first
    layer on where it does."""
    large = {
        path
        for (path, operator, _), peak in peaks.items()
        if not peak.value <= LIMIT / SAFETY and not operator.startswith("_scaled_dot")
    }
    found, stream = set[str](), set[str]()
    for path, part in reference.parts.items():
        tower, leaf = path.partition(".")[0], path.rpartition(".")[2]
        if path in large:
            found.add(path)
            if leaf in STREAM:
                stream.add(tower)
        if isinstance(part, Sum) and tower in stream:  # the last part of its layer
            found.add(path)
    return frozenset(found)


def _held(peaks: Peaks, rounded: Peaks) -> Iterator[tuple[Key, Peak]]:
    """What the model holds in float16, with its float32 peak."""
    for key, peak in rounded.items():
        if peak.dtype != torch.float16 or key[1] == CAST:
            continue
        if key not in peaks:
            raise ExportError(
                f"{title(key)} runs in float16 only, so its range is not known; report the model"
                " and the command"
            )
        yield key, peaks[key]


def _require_finite(held: Peaks, rounded: Peaks, samples: int, may_keep: bool, half: Eager) -> None:
    """ExportError where a float16 number passes the limit; it names the first."""
    large = {key: peak for key, peak in held.items() if not peak.value <= LIMIT}
    above = dict(large)
    for key, peak in rounded.items():
        if peak.dtype == torch.float16 and math.isinf(peak.value):
            above.setdefault(key, peak)
    if not above:
        return
    first = next(key for key in rounded if key in above)
    peak, others = above[first], len({key[0] for key in above if key in large} - {first[0]})
    reaches = f"reaches {peak.value:.4g}" if math.isfinite(peak.value) else "is not finite"
    more = f", the first of {others + 1} parts that do" if others else ""
    advice = (
        "export with --keep-fp32 auto, which computes such parts in float32, or with --dtype bf16"
        if may_keep and not any(half.is_narrow(path) for path, _, _ in large)
        else "it cannot stay in float32: export with --dtype bf16 or --dtype fp32"
    )
    raise ExportError(
        f"fp16 ends at {LIMIT:,.0f}, {title(first)} {reaches} on sample {peak.sample} of"
        f" {samples}{more}; {advice}"
    )


def title(key: Key) -> str:
    """For people: `decoder layers.1 gate * up`, `vision blocks.3 down`."""
    path, operator, _ = key
    tower, *names = [name for name in path.split(".") if name != "encoder"]
    at = next((i + 1 for i, name in enumerate(names) if name.isdigit()), 0)
    layer, part = ".".join(names[:at]), ".".join(names[at:])
    part = TITLES.get(names[-1] if names else "", part) or f"({operator})"
    return " ".join(word for word in (tower or "input", layer, part) if word)


def _notes(record: RangeRecord, peaks: Peaks, keep: str) -> Iterator[str]:
    if record.margin < SAFETY:
        wider = "--keep-fp32 auto" if keep == "none" else "--dtype bf16"
        yield (
            f"{record.where} comes within a factor of {record.margin:.2g} of fp16's {LIMIT:,.0f}:"
            f" other images may pass it; {wider} leaves more room"
        )
    roots = [(peak.value, key[0]) for key, peak in peaks.items() if key[1] == RSQRT]
    largest, path = max(roots, default=(1.0, ""))
    if (mean := largest**-2) < TINY:
        yield (
            f"{title((path, 'norm', 0))}: a mean square is {mean:.1e}, below fp16's smallest"
            " number; it is right only where norms are computed in float32, as the graphs say"
        )


def summary(record: RangeRecord) -> list[str]:
    """The parts in float32, the residual stream as `from` its first layer on."""
    titles, streams = list[str](), set[str]()
    for path in record.float32:
        tower, leaf = path.partition(".")[0], path.rpartition(".")[2]
        if leaf != "residual":
            titles.append(title((path, "", 0)))
        elif tower not in streams:
            streams.add(tower)
            titles.append(f"{title((path, '', 0))} and after")
    return titles
