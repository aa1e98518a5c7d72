"""The ratios of one export: what each asks, and what is recorded of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from edgeprune.errors import ParityError
from edgeprune.export.ranges import Proof
from edgeprune.manifest import PruneRecord, RatioRecord
from edgeprune.measured import ParityRecord, RangeRecord
from edgeprune.models import Adapter
from edgeprune.policies import Policy, seed_of
from edgeprune.spec import Plan, PruneSpec


@dataclass(frozen=True)
class Setting:
    """One ratio of a bundle: what was asked, the counts, and the schedule that they are from."""

    spec: PruneSpec
    plan: Plan
    schedule: dict[str, Any] | None = None


def prune_record(setting: Setting, adapter: Adapter, policy: Policy) -> PruneRecord:
    """What the manifest says of a ratio."""
    plan, spec = setting.plan, setting.spec
    return PruneRecord(
        method=spec.method,
        cr=spec.cr,
        cr_reached=plan.cr,
        visual_tokens=plan.visual_tokens,
        grid=adapter.shape.grid,
        counts=plan.counts,
        stages=plan.stages,
        reads_text=policy.reads_text and bool(plan.in_decoder),
        seed=seed_of(policy),
        options=dict(spec.options),
        schedule=setting.schedule,
    )


def ratio_records(
    dial: Sequence[Setting], checked: Sequence[ParityRecord], adapter: Adapter, policy: Policy
) -> tuple[RatioRecord, ...]:
    """What the manifest says of every ratio, where there are several."""
    span = adapter.decoder_config.span
    return tuple(
        RatioRecord(prune_record(setting, adapter, policy), span(setting.plan), parity)
        for setting, parity in zip(dial, checked, strict=True)
    )


def range_of(proofs: Sequence[Proof]) -> RangeRecord | None:
    """The largest magnitude over all ratios, and every part that has to stay in float32."""
    if not proofs:
        return None
    wide = dict.fromkeys(path for proof in proofs for path in proof.record.float32)
    largest = max((proof.record for proof in proofs), key=lambda record: record.peak)
    return replace(largest, float32=tuple(wide))


@contextmanager
def named(setting: Setting, several: bool) -> Iterator[None]:
    """Names the ratio in what parity says, where there are several."""
    try:
        yield
    except ParityError as error:
        raise ParityError(
            f"at CR {setting.spec.cr:g} {error}" if several else str(error)
        ) from error
