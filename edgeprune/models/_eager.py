"""The eager model for dialogues about many images, with some of its layers in memory at a time.

The modules are those of `Reference`, and so are the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch

from edgeprune.models._activations import Activations, Kept
from edgeprune.models._adapter import Adapter
from edgeprune.models._dialogues import Outcome
from edgeprune.models._layers import Narrow, Part, parts, widen
from edgeprune.models._ops import TorchOps
from edgeprune.models._processor import Prompt
from edgeprune.models._stages import DecoderStages, DialogueState, ImageState, Stages, VisionStages
from edgeprune.models._streamed import Streamed
from edgeprune.policies import Policy
from edgeprune.spec import Plan

S = TypeVar("S", ImageState, DialogueState)
Around = Callable[[str, int], AbstractContextManager[object]]
"""Told the path of a stage and the number of the sample, from 1: open while it goes through it."""


class Eager:
    """The eager model in some dtype, for dialogues about many images."""

    def __init__(
        self,
        adapter: Adapter,
        policy: Policy,
        plan: Plan,
        dtype: torch.dtype = torch.float32,
        *,
        held: torch.dtype | None = None,
        ops: TorchOps | None = None,
        wide: Collection[str] = (),
    ) -> None:
        """`held`: float32 with weights and tables rounded to this dtype. `wide`: paths of the parts
        that compute in float32."""
        with torch.device("meta"):
            vision, decoder = adapter.vision(policy, plan, ops), adapter.decoder(policy, plan, ops)
        self.plan, self.dtype = plan, dtype
        self.vision = VisionStages(vision, Streamed(adapter, vision, dtype, held=held))
        self.decoder = DecoderStages(decoder, Streamed(adapter, decoder, dtype, held=held))
        self.activations = Activations()
        self.widen(wide)

    @property
    def parts(self) -> dict[str, Part]:
        """What may stay in float32, by path, in the order of the model."""
        return parts("vision", self.vision.vision) | parts("decoder", self.decoder.decoder)

    def is_narrow(self, path: str) -> bool:
        """Whether a module computes what is held in the model's dtype, as in a cache."""
        tower, _, rest = path.partition(".")
        owner = {"vision": self.vision.vision, "decoder": self.decoder.decoder}.get(tower)
        return owner is not None and isinstance(owner.get_submodule(rest), Narrow)

    def widen(self, paths: Collection[str]) -> None:
        """Let the parts of these paths compute in float32."""
        widen("vision", self.vision.vision, paths)
        widen("decoder", self.decoder.decoder, paths)

    @property
    def stages(self) -> int:
        """How many stages a sample goes through."""
        return len(self.vision.titles) + len(self.decoder.titles)

    def begin(self, prompts: Iterable[Prompt]) -> Kept[ImageState]:
        """Images before the encoder."""
        return self.activations.keep(ImageState((p.pixels.to(self.dtype),)) for p in prompts)

    @torch.no_grad()
    def outcomes(
        self,
        prompts: Sequence[Prompt],
        report: Callable[[int, int], None] = lambda done, total: None,
        around: Around = lambda stage, number: nullcontext(),
    ) -> list[Outcome]:
        """What the model makes of samples; `report` is told how often a sample went through a
        stage, and how often it will."""
        ticks, total = 0, len(prompts) * self.stages

        def run(stages: Stages[S], kept: Kept[S]) -> Kept[S]:
            nonlocal ticks
            for window in stages.windows():
                with stages.loaded(window):
                    kept = self.activations.keep(
                        through(stages, window, number, state)
                        for number, state in enumerate(kept.drain(), 1)
                    )
            return kept

        def through(stages: Stages[S], window: range, number: int, state: S) -> S:
            nonlocal ticks
            for stage in window:
                with around(stages.path(stage), number):
                    state = stages.advance(stage, state)
                ticks += 1
                report(ticks, total)
            return state

        seen = list(run(self.vision, self.begin(prompts)).drain())
        pairs = zip(prompts, seen, strict=True)
        talks = [self.decoder.begin(p, one.shown[0], one.chosen[0]) for p, one in pairs]
        said = run(self.decoder, self.activations.keep(talks)).drain()
        pairs_of = zip(seen, said, strict=True)
        return [Outcome(talk.chosen, one.shown[0], talk.shown) for one, talk in pairs_of]
