"""Parity: an exported pair of graphs against the eager reference of the same policy, in float32.

Each sample is prefilled, decoded for two tokens and asked again on the same cache. The indices that
each site's survivors take must be the same, the visual tokens, merged ones too, and all logits
within a tolerance. Where the kept tokens differ, it may be a tie: two engines round differently,
and a choice between equals falls otherwise. Then the reference, its pixels off by no more than
rounding, makes the graph's choice itself, with the graph's logits. Ties are counted and bounded.

A graph in half precision is compared as a float32 copy, with a reference of the same rounded
weights: that proves structure and weights to the last digits. What rounding does to the model is
judged apart (precision.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from edgeprune.bundle import ParityRecord
from edgeprune.errors import ParityError
from edgeprune.export.dialogue import REPORT, Graphs, Outcome, play, require_finite
from edgeprune.export.upcast import upcast
from edgeprune.graphs import GraphRecord
from edgeprune.models._processor import Prompt
from edgeprune.models._reference import Reference
from edgeprune.spec import Plan

TOLERANCE = 1e-4
"""Largest difference of two values, as a share of the largest of them."""

TINY = 1e-30
"""What is smaller than this counts as nothing."""

NUDGES = 192
"""So many times pixels are changed by rounding before a difference is called one: where a greedy
order has gone down to little, one in twenty was seen to turn a choice as another engine does."""

MOST_TIES = 1 / 3
"""Of the samples, at most. A tie is compared with a nudged reference only, so most samples must be
compared with the reference itself; a graph that chooses wrongly differs on more than this."""

WEIGHTS = "check the checkpoint's weights for infinities, NaN and values that the dtype cannot hold"
"""What to do where numbers are not finite in float32."""

BYTES = 8
"""Memory for each weight: the eager model in float32, and its graph, or in half precision first the
eager model and the graph in that."""


@dataclass(frozen=True)
class Differing:
    """A sample whose kept tokens differ, or whose merged ones may: a tie or a fault."""

    prompt: Prompt
    token: Tensor  # int64 [1, 1], that the first decode step was given
    found: Outcome
    wanted: Outcome


def check(
    graphs: Graphs,
    reference: Reference,
    prompts: Iterable[Prompt],
    progress: Callable[[int], None] = lambda done: None,
) -> ParityRecord:
    """Compare float32 graphs with their reference; ParityError where they disagree."""
    plan = reference.decoder.plan
    visual, logits, done, differing = 0.0, 0.0, 0, list[Differing]()
    for prompt in prompts:
        done += 1
        wanted, token = play(reference, prompt)
        found, _ = play(graphs, prompt, token)
        require_finite(wanted, "the eager reference in float32", done, WEIGHTS)
        require_finite(found, "the exported graph in float32", done, WEIGHTS)
        if found.keeps_as(wanted) and (agree(found, wanted) or not _merges(plan)):
            _require_agreement(found, wanted)
            visual = max(visual, difference(found.visual, wanted.visual))
            logits = max(logits, _worst(found, wanted))
        else:
            differing.append(Differing(prompt, token, found, wanted))
        progress(done)
    if len(differing) > MOST_TIES * done:
        raise ParityError(_too_many(differing, done))
    for one in differing:
        if not _is_tie(reference, one):
            raise ParityError(f"{_fault(one.found, one.wanted)}; nothing was written. {REPORT}")
    return ParityRecord(done, "", len(differing), visual, logits, TOLERANCE)


def check_copy(
    folder: Path,
    record: GraphRecord,  # of decoder.onnx
    reference: Reference,
    dtype: torch.dtype,
    prompts: Iterable[Prompt],
    progress: Callable[[int], None] = lambda done: None,
) -> ParityRecord:
    """Compare a float32 copy of half-precision graphs; the reference's weights are rounded."""
    reference.round_weights(dtype)
    with TemporaryDirectory(dir=folder) as copy:
        upcast(folder, Path(copy))
        return check(Graphs(Path(copy), record, reference.decoder), reference, prompts, progress)


def _merges(plan: Plan) -> bool:
    """Whether tokens are merged: then equal indices may stand for other averages."""
    return any(stage.merged or stage.site == "block" for stage in plan.stages)


def _require_agreement(found: Outcome, wanted: Outcome) -> None:
    if not agree(found, wanted):
        raise ParityError(f"{_fault(found, wanted)}; nothing was written. {REPORT}")


def agree(found: Outcome, wanted: Outcome) -> bool:
    """Whether two engines kept the same tokens and gave the same numbers, by TOLERANCE."""
    return found.keeps_as(wanted) and _apart(found, wanted) <= TOLERANCE


def _apart(found: Outcome, wanted: Outcome) -> float:
    """The largest difference of visual tokens and logits."""
    return max(difference(found.visual, wanted.visual), _worst(found, wanted))


def _worst(found: Outcome, wanted: Outcome) -> float:
    return max(map(difference, found.logits, wanted.logits))


def difference(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, as a share of the largest value: none is too small to be compared."""
    scale = max(TINY, float(wanted.abs().max()))
    return float((wanted - found).abs().max()) / scale


def _is_tie(reference: Reference, one: Differing) -> bool:
    """Whether the reference answers as the graph when its pixels are off by rounding.

    Where many choices are close, as in a greedy order, no two roundings turn the same ones. The
    graph is right then too if it keeps what is kept always, and nothing that never is.
    """
    others = [one.wanted]
    for nudged in _nudges(one.prompt):
        other, _ = play(reference, nudged, one.token)
        if agree(one.found, other):
            return True
        others.append(other)
    return _is_among(one.found, others)


def _is_among(found: Outcome, others: Sequence[Outcome]) -> bool:
    """Whether a choice that nobody else made is made of choices that some did, site by site.

    Its numbers then are as near to one of the others as these are to the first of them.
    """
    if any(found.keeps_as(other) for other in others):
        return False  # the same choice, in the same order, so something else differs
    sites = zip(found.survivors(), *(other.survivors() for other in others), strict=True)
    if not all(set.intersection(*seen) <= own <= set.union(*seen) for own, *seen in sites):
        return False
    spread = max(_apart(other, others[0]) for other in others[1:])
    return min(_apart(found, other) for other in others) <= spread


def _nudges(prompt: Prompt) -> Iterator[Prompt]:
    """The prompt with noise of 2 to 512 units in the last place of its largest pixel.

    Rounding adds up from layer to layer, the noise of many pixels averages out within a patch.
    """
    generator = torch.Generator().manual_seed(0)
    unit = torch.finfo(torch.float32).eps * float(prompt.pixels.abs().max())
    for nudge in range(NUDGES):
        noise = torch.randn(prompt.pixels.shape, generator=generator)
        yield replace(prompt, pixels=prompt.pixels + 2 ** (1 + nudge % 9) * unit * noise)


def _fault(found: Outcome, wanted: Outcome) -> str:
    """Where two outcomes part first."""
    if not found.keeps_as(wanted):
        return "the exported graph keeps other tokens than the eager reference"
    visual = difference(found.visual, wanted.visual)
    what, by = (
        ("visual tokens", visual) if not visual <= TOLERANCE else ("logits", _worst(found, wanted))
    )
    return (
        f"the exported graph's {what} differ from the eager reference by {by:.2e}, at most"
        f" {TOLERANCE:g} is right"
    )


def _too_many(differing: Sequence[Differing], samples: int) -> str:
    """More samples differ than ties may explain."""
    first = _fault(differing[0].found, differing[0].wanted)
    return (
        f"{first} on {len(differing)} of {samples} samples, and a tie may explain it on a third of"
        f" them at most; nothing was written. Check more samples with --parity N, or report the"
        " model and the command"
    )
