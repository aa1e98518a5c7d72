"""What can be reached with each encoder, by the dense encoder's evidence; every measurement is made
once, when it is asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from edgeprune.calib.calibrate import CalibrationRequest, evidence_of
from edgeprune.calib.encoder import SiteMeasurement, check_limit, chooses
from edgeprune.calib.entry import EntryLoss, behind_drop, left_tokens, measure_entry, pose
from edgeprune.calib.schedule import Evidence
from edgeprune.calib.ttft import Costs, Curve, Point, curve, fastest, menu, points
from edgeprune.encoder_methods import AUTO, make
from edgeprune.errors import SpecError
from edgeprune.models import Adapter
from edgeprune.models._encoder_site import SiteConfig
from edgeprune.models._processor import Processor
from edgeprune.policies import Policy
from edgeprune.progress import Progress, silent
from edgeprune.spec import PruneSpec


@dataclass(frozen=True)
class Work:
    """What a survey measures with."""

    request: CalibrationRequest
    adapter: Adapter  # its encoder dense
    policy: Policy
    processor: Processor
    report: Progress = silent


def joint_spec(spec: PruneSpec) -> PruneSpec:
    """The spec of a method that is chosen together with an encoder: tokens keep their positions,
    unless it says otherwise. Published methods renumber what they choose before layer 1, which
    turns the output more than the tokens that are missed."""
    return replace(spec, options={"positions": "keep", **spec.options})


@dataclass(frozen=True)
class Survey:
    """The encoders that --encoder names, and what is known of each: `auto` is some exits and drops,
    one method itself, `dense` nothing. The dense encoder, None, is always among them."""

    work: Work
    costs: Costs
    encoder: str

    def __post_init__(self) -> None:
        """SpecError where the decoder's method follows no schedule."""
        if self.work.policy.entry_tokens(self.work.adapter.shape, 1) is None:
            raise SpecError(
                "this method follows no schedule, so no counts can be chosen for a budget; give"
                " --method auto or utp"
            )

    @cached_property
    def sites(self) -> list[SiteConfig]:
        """Of the encoders beside the dense one; none is measured."""
        adapter = self.work.adapter
        named = None if self.encoder == AUTO else make(self.encoder)
        methods = menu(adapter) if self.encoder == AUTO else [named] if named else []
        return [adapter.encoder_site(method) for method in methods]

    def fastest(self, site: SiteConfig | None) -> Point:
        """What an encoder spends at least. Nothing is measured for it, and no loss is known."""
        shape = self.work.adapter.with_encoder(site).shape
        enter = shape.separators + 1 if self._open(site) else shape.encoded
        return fastest(self.costs, site, enter)

    def points(self, site: SiteConfig | None) -> list[Point]:
        """An encoder's schedules of which none is both faster and better than another. Where the
        encoder is not measured its own loss is left out."""
        return points(self.costs, site, self._curve(site))

    def measured(self, site: SiteConfig) -> SiteConfig:
        """With its map and its loss; SpecError where a method that is named loses more than its
        limit. Of `auto` the budget says what may be lost."""
        found = self._measurement.of(site)
        if self.encoder != AUTO:
            check_limit(found)
        return found

    def check_named(self) -> None:
        """Measure the encoder that is named, lest the dense one is taken in its place without a
        word; SpecError where it loses more than its limit."""
        if self.encoder != AUTO:
            for site in self.sites:
                self.measured(site)

    def all_points(self) -> list[Point]:
        """Of all encoders, each measured."""
        sites = [None, *(self.measured(site) for site in self.sites)]
        return [point for site in sites for point in self.points(site)]

    def _open(self, site: SiteConfig | None) -> bool:
        """Whether fewer tokens than the encoder gives may enter layer 1."""
        adapter, policy = self.work.adapter, self.work.policy
        return self._chooses and (site is None or chooses(adapter.with_encoder(site), policy))

    def _curve(self, site: SiteConfig | None) -> Curve:
        if site is None or site.method.rejoins:
            return self._whole if self._open(site) else self._all_enter
        work = self.work
        given = work.request, work.adapter.with_encoder(site), work.processor, work.policy
        left = left_tokens(*given, work.report)
        entry = self._entry if self._open(site) else None
        return curve(self.costs, pose(behind_drop(self._evidence, left), entry))

    @cached_property
    def _chooses(self) -> bool:
        return chooses(self.work.adapter, self.work.policy)

    @cached_property
    def _measurement(self) -> SiteMeasurement:
        work = self.work
        given = work.request, work.adapter, work.processor, work.policy
        return SiteMeasurement(*given, work.report)

    @cached_property
    def _evidence(self) -> Evidence:
        work = self.work
        return evidence_of(work.request, work.adapter, work.policy, work.processor, work.report)

    @cached_property
    def _entry(self) -> EntryLoss | None:
        work = self.work
        return measure_entry(work.request, work.adapter, work.processor, work.policy, work.report)

    @cached_property
    def _whole(self) -> Curve:
        """Behind V tokens, of which any number may enter."""
        return curve(self.costs, pose(self._evidence, self._entry))

    @cached_property
    def _all_enter(self) -> Curve:
        """Behind V tokens that all enter layer 1."""
        return curve(self.costs, pose(self._evidence, None))
