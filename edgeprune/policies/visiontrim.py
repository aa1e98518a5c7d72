"""VisionTrim: tokens that the encoder finds important, and the others gathered around the question.

DVTS chooses the dominant tokens in the encoder; they keep their reading order. TGVC merges the rest
into complement tokens, which follow: its centres are the tokens most alike to the text, every other
token joins the centre that relates to the text as it does, and each round adds to a centre what
its members say. A quarter of all tokens are complement tokens, as in the paper's 144 + 48.
Positions are renumbered, since tokens leave before the decoder.
Of several tiles (crops, images, frames) each has its share of both, as in the paper's tables.
`tiles=joint` ranks and merges all tokens together.

`variant=released`, what the released code computes: DVTS is the mean of [CLS] attention and of the
attention received from the other patches, each divided by its length; a token's similarity to the
text is its mean cosine with it; it joins the centre with the largest product of their cosines with
the text, and a round adds the plain mean of a centre's members.
`variant=paper`: DVTS is Eq. 6, the softmax of [CLS] attention and the local measure LTAM, each
weighted by the other's share of the variance; a token's similarity to the text is its mean share of
each text token's softmax over all tokens; it joins by the product of softmaxes over the text, and a
round adds the mean weighted by that product.
LTAM as printed is one constant but at the borders (a softmax averaged over its own support): it is
the released code's, which the code itself then overwrites. The mean over 3 x 3 patches of
-(feature distance)^2 / variance - (distance)^2 / (2 variance), 0 outside, goes through a softmax
over all patches, and both scores through another one before they are weighted.

Deviations:
- The text branch reads CLIP's text tower and its projection of visual tokens, which no checkpoint
  of the supported families holds. Here the text is the embeddings that the decoder reads after the
  image and a visual token is what the projector makes of it. So the merge is in the decoder's graph
  and comes after the projector, not before, and the text includes the end of the chat template.
- The released code scales cosines by CLIP's temperature, which changes no choice, and lets a
  centre's length grow with the rounds; here centres are normalised anew in each round.
- The softmax of Eq. 8 is over the visual tokens, since over the text it would be one constant.
- The second stage, in the decoder, is off: the paper names neither its layer nor its count, and the
  released code has it commented out. `llm` names a layer after which the tokens with the most mean
  softmax(h_t h_v / sqrt(D)) go on (Eq. 13, over the visual tokens for the same reason) and none is
  merged; `llm_share` of the tokens that entered.
- Of several tiles, the complement tokens of all follow the dominant tokens of all; in the released
  code each crop's follow its own. That code cannot merge by text for LLaVA-NeXT, and here models
  with newlines between tiles are refused.
- Where an encoder has no [CLS], received attention alone counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from edgeprune.errors import SpecError
from edgeprune.policies import _policy
from edgeprune.policies._clusters import average
from edgeprune.policies._counts import listed
from edgeprune.policies._locality import locality
from edgeprune.policies._merge import join, split
from edgeprune.policies._policy import Merge, Selection
from edgeprune.policies._raters import similarity
from edgeprune.policies._schedules import layer_of
from edgeprune.policies._select import top, unit
from edgeprune.policies._signals import LEAST, InputSignals, LayerSignals, VisionSignals
from edgeprune.policies._sizes import least, total
from edgeprune.policies._tiles import among_all, check_tiles, part, parts, shared, together
from edgeprune.spec import AUTO, ModelShape, Plan, Stage, budget

VARIANTS = ("released", "paper")

Scores = Callable[[Sequence[int]], Tensor]
"""Of the tokens with some indices, how dominant they are among each other: float32 [n]."""


@dataclass(frozen=True)
class Policy(_policy.Policy):
    variant: str = "released"  # what is computed: released or paper
    complement: float = 0.25  # share of the tokens that are merged around the text: 48 of 192
    tiles: str = "each"  # each tile has its share of the tokens; joint: they compete for all
    counts: str = "auto"  # or the tokens that stay, such as 192; with llm too, such as 192/96
    rounds: int = 3  # in which the centres take in their members
    llm: str = "off"  # or a layer after which the decoder prunes once more; auto: half of all
    llm_share: float = 0.5  # of the tokens, that go on there

    paper: ClassVar[str] = (
        "VisionTrim: Unified Vision Token Compression for Training-Free MLLM Acceleration"
    )
    summary: ClassVar[str] = "important tokens, and the others gathered around the question"
    sites: ClassVar[tuple[str, ...]] = ("vision", "input", "layer")
    needs: ClassVar[tuple[str, ...]] = ("text",)
    stands_in: ClassVar[str] = "the decoder's text embeddings in place of CLIP's text tower"

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise SpecError(f"--set variant= is released or paper; got {self.variant!r}")
        for name, share in (("complement", self.complement), ("llm_share", self.llm_share)):
            if not 0 < share < 1:
                raise SpecError(f"--set {name}= is a share between 0 and 1; got {share:g}")
        if self.rounds < 1:
            raise SpecError(f"--set rounds= is at least 1; got {self.rounds}")
        check_tiles(self.tiles)

    def looks_at_attention(self) -> bool:
        return False

    def sizes(self, shape: ModelShape, cr: float, schedule: _policy.Counts | None = None) -> Plan:
        if shape.separators:
            raise SpecError(
                "method visiontrim hands its dominant tokens to the decoder's graph as the first of"
                " all, which leaves none for this model's separators; choose another method,"
                " such as visionzip"
            )
        tokens, layers = shape.visual_tokens, shape.layers
        entering, later, last = self._counts(shape, cr)
        stages = list[Stage]()
        if entering < tokens:
            merged = min(round(self.complement * entering), entering - 1)
            dominant = entering - merged
            stages = [Stage("vision", dominant)]
            if merged:
                first = Stage("vision", tokens, lead=dominant)
                stages = [first, Stage("input", dominant, merged, text=True)]
        if later < entering:
            stages.append(Stage("layer", later, layer=last + 1))
        return Plan(tokens, layers, tuple(stages))

    def vision(self, signals: VisionSignals, stage: Stage) -> Selection:
        scores = self._released(signals) if self.variant == "released" else self._paper(signals)
        count, keep = signals.features.shape[1], stage.lead or stage.keep
        groups = parts(signals.tile_of, count, self.tiles)
        dominant, rest = list[Tensor](), list[Tensor]()
        for own, share in zip(groups, shared(keep, list(map(len, groups))), strict=True):
            best, left = split(scores(own), share)
            if share:
                dominant.append(among_all(best, own, count))
            rest.append(among_all(left, own, count))
        first = together(dominant)
        return Selection(torch.cat([first, *rest]) if stage.lead else first)

    def input(self, signals: InputSignals, stage: Stage, live: Stage) -> Selection:
        visual, text = signals.visual[0].float(), signals.question().float()
        count, start = visual.shape[0], live.keep
        sizes = [len(own) for own in parts(signals.tile_of, signals.visual_tokens, self.tiles)]
        left = [size - kept for size, kept in zip(sizes, shared(stage.keep, sizes), strict=True)]
        at = [torch.arange(live.keep, device=visual.device)]
        made = list[tuple[int, int, Merge]]()
        for others, merged in zip(left, shared(stage.merged, left), strict=True):
            size = least(others, count)
            if merged:
                rest = visual.narrow(0, start, size)
                centres, gather = self._gathered(rest, text, least(merged, count))
                at.append(centres + start)
                made.append((start, size, gather))
            start = start + size

        def merge(features: Tensor) -> Tensor:
            tokens = features.float()
            merged = (gather(tokens.narrow(0, begin, own)) for begin, own, gather in made)
            return torch.cat([tokens.narrow(0, 0, live.keep), *merged])

        return Selection(torch.cat(at), merge)

    def why_frozen(self) -> str:
        return _policy.MERGES

    def layer(self, signals: LayerSignals, stage: Stage, live: Stage) -> Selection:
        visual, text = signals.visual[0].float(), signals.text[0].float()
        return Selection(top(shares(visual, text), live.keep))

    def _counts(self, shape: ModelShape, cr: float) -> tuple[int, int, int]:
        """r_1, the count after the stage in the decoder, and the layer before it."""
        tokens, layers = shape.visual_tokens, shape.layers
        if self.counts != AUTO:
            last = layers if self.llm == "off" else layer_of("llm", self.llm, 1 / 2, shape)
            given = listed(self.counts, 1 + (last < layers), tokens)
            return given[0], given[-1], last
        total = budget(tokens, layers, cr)
        if self.llm == "off":
            entering = max(1, round(total / layers))
            return entering, entering, layers
        last = layer_of("llm", self.llm, 1 / 2, shape)
        entering = round(total / (last + self.llm_share * (layers - last)))
        entering = min(tokens, max(1, entering))
        later = round((total - last * entering) / (layers - last))
        return entering, min(entering, max(1, later)), last

    def _released(self, signals: VisionSignals) -> Scores:
        """[CLS] attention and attention from other patches, both of length 1."""
        received = signals.received_attention(from_others=True)
        wide = None if signals.cls is None else signals.cls_attention()

        def scores(own: Sequence[int]) -> Tensor:
            among = _unit(part(received, own))
            return among if wide is None else (_unit(part(wide, own)) + among) / 2

        return scores

    def _paper(self, signals: VisionSignals) -> Scores:
        """Eq. 6: S = a S_g + (1 - a) S_l, a = var(S_l) / (var(S_g) + var(S_l)).

        LTAM ends in a softmax, and the code takes one of either score before it weighs them.
        """
        salience, features, (rows, columns) = signals.salience(), signals.features[0], signals.grid

        def scores(own: Sequence[int]) -> Tensor:
            grid = rows * len(own) // features.shape[0], columns  # tiles stand below each other
            wide = part(salience, own).softmax(0)
            near = locality(part(features, own), grid).softmax(0).softmax(0)
            share = near.var() / (wide.var() + near.var()).clamp(min=1e-30)
            return share * wide + (1 - share) * near

        return scores

    def _gathered(self, rest: Tensor, text: Tensor, count: int) -> tuple[Tensor, Merge]:
        """Centres int64 [count], rising, of the rest [n, D], and what makes complement tokens
        [count, width] of features of the rest."""
        released = self.variant == "released"
        alike = (unit(rest) @ unit(text).T).mean(1) if released else shares(rest, text)
        centres = top(alike, count)
        tokens = rest.index_select(0, centres)
        indices = torch.arange(rest.shape[0], device=rest.device)
        free = 1 - total((centres[:, None] == indices[None, :]).float(), 0)
        related, weights = self._related(rest, text), None
        joined = list[tuple[Tensor, Tensor | None]]()
        for _ in range(self.rounds):
            products = self._related(tokens, text) @ related.T  # [count, n]
            if not released:
                weights = products + 1 / text.shape[0]
            joined.append((join(products) * free, weights))
            tokens = tokens + average(joined[-1][0], rest, weights)

        def gather(features: Tensor) -> Tensor:
            gathered = features.index_select(0, centres)
            for members, weights in joined:
                gathered = gathered + average(members, features, weights)
            return gathered

        return centres, gather

    def _related(self, tokens: Tensor, text: Tensor) -> Tensor:
        """How each token relates to each text token: [n, D], [T, D] -> [n, T].

        Shares less their mean 1 / T, since all are near it: a product of shares is 1 / T more than
        that of what is left, whose digits decide.
        """
        if self.variant == "released":
            cosines: Tensor = unit(tokens) @ unit(text).T
            return cosines
        return similarity(tokens, text, tokens.shape[1] ** -0.5) - 1 / text.shape[0]


def _unit(scores: Tensor) -> Tensor:
    """Scores divided by their length: [N]."""
    length: Tensor = scores.norm()
    return scores / length.clamp(min=1e-12)


def shares(visual: Tensor, text: Tensor) -> Tensor:
    """Mean over text tokens of their softmax over the visual tokens: [n, D], [T, D] -> [n]."""
    logits = text @ visual.T * visual.shape[1] ** -0.5
    spare = logits.new_full((logits.shape[0], 1), LEAST)  # ONNX Runtime reduces nothing where n = 0
    return torch.cat([logits, spare], dim=1).softmax(1).mean(0)[:-1]
