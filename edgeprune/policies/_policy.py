"""What every pruning method answers: its sizes before tracing, its choices while running."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from edgeprune.errors import SpecError
from edgeprune.policies._signals import InputSignals, LayerSignals, VisionSignals
from edgeprune.spec import ModelShape, Plan, Stage


class Counts(Protocol):
    """A solved schedule: r_1 ... r_L."""

    @property
    def counts(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Policy:
    """Base of all methods; never built itself. Sizes are ints, so traced shapes stay static."""

    paper: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    sites: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()  # beside the picture: text, [CLS], calibration

    def first(self, shape: ModelShape, cr: float) -> int | None:
        """r_1 for a method whose other counts come from a calibrated schedule, else None."""
        return None

    def plan(self, shape: ModelShape, cr: float, schedule: Counts | None = None) -> Plan:
        """Stages for a model and a compression ratio; SpecError where it cannot be reached."""
        raise NotImplementedError

    def vision(self, signals: VisionSignals, stage: Stage) -> Tensor:
        """Positions of the stage.keep visual tokens that stay, rising: int64 [keep]."""
        raise SpecError(f"{type(self).__module__} does not prune in the vision encoder")

    def input(self, signals: InputSignals, stage: Stage, keep: int) -> Tensor:
        """Positions of the `keep` = min(stage.keep, live) visual tokens that stay: int64 [keep]."""
        raise SpecError(f"{type(self).__module__} does not prune at the decoder's input")

    def layer(self, signals: LayerSignals, stage: Stage, keep: int) -> Tensor:
        """Positions of the `keep` = min(stage.keep, live) visual tokens that stay: int64 [keep]."""
        raise SpecError(f"{type(self).__module__} does not prune in the decoder")

    def record(self, layer: int, signals: LayerSignals) -> Tensor:
        """What calibration collects in `layer` (1-based): float32 [visual], larger stays longer."""
        return signals.last_query_attention()
