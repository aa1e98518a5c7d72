"""DPP: tokens unlike each other, those near the question first, each at its own position.

A greedy determinant (Chen et al. 2018) as in CDPruner, over unit projected tokens x_i times
r_i ** power: L_ij = r_i^p cos(x_i, x_j) r_j^p, where r_i is the mean cosine of token i to the
embeddings of the text after the image, scaled to 0 .. 1. It runs in the decoder's graph, before
layer 1, so all layers are entered by V / CR tokens. Its steps are unrolled, one for each token that
stays; a decode step runs them too, on nothing, and is slower for it, most of all on a GPU.

This project's own method, from a search on validation scenes of benchmarks/scenes576
(docs/accuracy.md has it with its failures):
- Tokens keep their positions. On test scenes that is worth 5.2 points at CR 4, three times what
  this method loses there by pruning.
- Relevance counts by its square root (`power=0.5`), which was best or near it at every ratio.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edgeprune.errors import SpecError
from edgeprune.policies import _policy
from edgeprune.policies._counts import ratio
from edgeprune.policies._diverse import determinant
from edgeprune.policies._policy import Selection
from edgeprune.policies._relevance import relevance
from edgeprune.policies._select import unit
from edgeprune.policies._signals import InputSignals
from edgeprune.spec import ModelShape, Plan, Stage, flat_plan


@dataclass(frozen=True)
class Policy(_policy.Policy):
    power: float = 0.5  # of the relevance; 0: diversity alone
    counts: str = "auto"  # or the tokens that stay, such as 64; --cr follows

    paper: ClassVar[str] = "none: found by a search of this project (docs/accuracy.md)"
    summary: ClassVar[str] = "as cdpruner, relevance by its root, tokens at their own positions"
    sites: ClassVar[tuple[str, ...]] = ("input",)
    needs: ClassVar[tuple[str, ...]] = ("text",)

    def sizes(self, shape: ModelShape, cr: float, schedule: _policy.Counts | None = None) -> Plan:
        if not 0 <= self.power <= 8:
            raise SpecError(f"--set power= is a number from 0 to 8; got {self.power:g}")
        cr = ratio(self.counts, shape, cr)
        return flat_plan(shape.visual_tokens, shape.layers, cr, "input", text=True)

    def renumbers(self, stage: Stage) -> bool:
        return False

    def why_frozen(self) -> str:
        return _policy.ONE_BY_ONE

    def input(self, signals: InputSignals, stage: Stage, live: Stage) -> Selection:
        directions = unit(signals.visual[0])
        quality = relevance(directions, unit(signals.question())).pow(self.power)
        return Selection(determinant(directions * quality[:, None], stage.keep, live.keep))
