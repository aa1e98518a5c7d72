"""Several ratios in one bundle: its graphs take the counts as an input, and all ratios share sites.

A site that only some of the ratios have keeps, at the others, every token that is alive there. A
method that keeps tokens in reading order changes nothing then.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from edgeprune.errors import SpecError
from edgeprune.spec import Plan, Stage

MOST = 16
"""Ratios of one bundle."""

_ORDER = ("encoder", "block", "vision", "input", "layer")


def check_ratios(ratios: Sequence[float]) -> None:
    """SpecError where a list of ratios names one twice, or too many."""
    if len({f"{cr:g}" for cr in ratios}) != len(ratios):  # as they are told, and served
        given = ",".join(f"{cr:g}" for cr in ratios)
        raise SpecError(f"--cr {given} names a ratio twice; give each once, the default first")
    if len(ratios) > MOST:
        raise SpecError(f"--cr lists {len(ratios)} ratios, a bundle has {MOST} at most")


def on_common_sites(plans: Sequence[Plan]) -> tuple[Plan, ...]:
    """The plans, each with a stage at every site that one of them has; their counts stay."""
    sites = dict.fromkeys(_site(stage) for plan in plans for stage in plan.stages)
    ordered = sorted(sites, key=lambda site: (site.layer, _ORDER.index(site.site), site.text))
    return tuple(replace(plan, stages=tuple(_stages(plan, ordered))) for plan in plans)


def widest(plans: Sequence[Plan]) -> Plan:
    """Of plans on common sites: at each site the most tokens that one of them keeps."""
    rows = zip(*(plan.stages for plan in plans), strict=True)
    stages = tuple(max(row, key=lambda stage: stage.keep) for row in rows)
    return replace(plans[0], stages=stages, dialed=True)


def _site(stage: Stage) -> Stage:
    """A stage without its size."""
    return replace(stage, keep=0)


def _stages(plan: Plan, sites: Iterable[Stage]) -> Iterable[Stage]:
    found = {_site(stage): stage for stage in plan.stages}
    live = plan.visual_tokens
    for site in sites:
        live = found[site].keep if site in found else live
        yield replace(site, keep=live)
