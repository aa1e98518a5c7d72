"""What every pruning method answers: its sizes before tracing, its choices while running."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

from torch import Tensor

from edgeprune.errors import SpecError
from edgeprune.policies._positions import with_positions
from edgeprune.policies._signals import BlockSignals, InputSignals, LayerSignals, VisionSignals
from edgeprune.spec import ModelShape, Plan, Stage

EVERY = """Of every method:
- Counts are fixed at export, the same for every image. What stays is chosen once, when an image is
  read; decode steps and later turns choose nothing.
- Scores are float32 in every graph. Of equal ones the lower position comes first; PyTorch, which
  the released codes use, promises no order.
- --set positions=keep leaves each token its position, =renumber closes the gaps of those that left.
  The default does what the published method does: most close gaps before the decoder and leave them
  inside. Under M-RoPE (Qwen-VL) each token keeps its row and column.
- Where a decoder has attention in some layers only (LFM2-VL), a method that looks at attention
  drops tokens behind such layers alone: a layer that is named, or published, stands for the next
  that has attention. In the other layers, convolutions, tokens that are left are neighbours.
"""
"""What holds of all methods alike, and so stands in no method's file."""


ONE_BY_ONE = "it chooses one token after the other, each by operators of its own"
MERGES = "it merges tokens into a number of averages that is fixed in its graphs"
CONSTANT = "its tokens are a constant of its graphs"
"""Why the counts of a method cannot be an input: `Policy.why_frozen`."""


class Counts(Protocol):
    """A solved schedule: r_1 ... r_L."""

    @property
    def counts(self) -> tuple[int, ...]: ...


Merge = Callable[[Tensor], Tensor]
"""From features of the live tokens to those of what goes on: [n, width] -> [survivors, width]."""


@dataclass(frozen=True)
class Selection:
    """What goes on at a site, in the order in which the decoder will read it.

    `indices` int64 [survivors]: for each token its index among the live ones; for a merged token
    the index of its cluster's centre. The stage.merged ones come last. In the vision graph N, the
    number of patches, stands for the encoder's own [CLS], which is no patch.
    There are stage.keep + stage.merged of them. `merge` makes their features of the live tokens'
    where some are merged, [n, width] -> [survivors, width]: sums with weights that are chosen
    already, so it serves any features of the live tokens. None: they are those at `indices`.
    """

    indices: Tensor
    merge: Merge | None = None

    def gather(self, live: Tensor) -> Tensor:
        """The features that go on, in the live tokens' dtype: [1, n, width] -> [1, survivors, .."""
        if self.merge is None:
            return live.index_select(1, self.indices)
        return self.merge(live[0]).to(live.dtype)[None]


@dataclass(frozen=True)
class BlockMerge:
    """Tokens that an encoder block merges: of S tokens r are merged into the S' that go on.

    The encoder averages, weighted by how many patches each token stands for.
    """

    stay: Tensor  # int64 [S'], those that go on, in the order in which they do
    source: Tensor  # int64 [r], those that do not
    into: Tensor  # float32 [S', r], 1 where a source becomes part of one that stays

    def apply(self, tokens: Tensor) -> Tensor:
        """Sums of what becomes one: float32 [S, width] -> [S', width]."""
        sums: Tensor = self.into @ tokens.index_select(0, self.source)
        return tokens.index_select(0, self.stay) + sums


@dataclass(frozen=True)
class Policy:
    """Base of all methods; never built itself. Sizes are ints, so traced shapes stay static."""

    positions: str = "auto"  # of what stays: keep, renumber, or auto: as the published method does

    paper: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    sites: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()  # beside the image: text, [CLS], calibration
    stands_in: ClassVar[str] = ""  # what is here in place of a part of the published method
    reads_text: ClassVar[bool] = False  # whether what stays of an image depends on the text

    def __init_subclass__(cls) -> None:
        cls.reads_text = "text" in cls.needs

    def entry_tokens(self, shape: ModelShape, cr: float) -> int | None:
        """r_1 for a method whose other counts come from a calibrated schedule, else None."""
        return None

    def plan(self, shape: ModelShape, cr: float, schedule: Counts | None = None) -> Plan:
        """Stages for a model and a compression ratio; SpecError where it cannot be reached."""
        looked_at = shape if self.looks_at_attention() else replace(shape, convolutions=())
        left, ratio = looked_at.behind_encoder(), shape.ratio_behind(cr)
        try:
            plan = self.sizes(left, ratio, schedule)
        except SpecError as error:
            if left is looked_at:
                raise
            raise SpecError(
                f"{error} (V and CR are those of the {left.visual_tokens} visual tokens that"
                f" --encoder leaves; --cr {cr:g} is CR {ratio:.4g} of these)"
            ) from error
        for stage in plan.stages:
            if stage.site == "layer" and stage.layer - 1 in looked_at.convolutions:
                raise SpecError(
                    f"tokens would be dropped behind layer {stage.layer - 1}, which has no"
                    f" attention to look at; behind layer {shape.attending(stage.layer - 1)}"
                    " they may"
                )
        return self._placed(plan, shape)

    def unpruned(self, shape: ModelShape) -> Plan:
        """All tokens that the encoder gives enter every layer."""
        return self._placed(Plan(shape.encoded, shape.layers), shape)

    def _placed(self, plan: Plan, shape: ModelShape) -> Plan:
        """A plan of what the encoder gives as one of all V, and where tokens stand."""
        if shape.after_encoder:
            first = Stage("encoder", shape.after_encoder)
            plan = replace(plan, visual_tokens=shape.visual_tokens, stages=(first, *plan.stages))

        def renumbers(stage: Stage) -> bool:
            return stage.site != "encoder" and self.renumbers(stage)

        return with_positions(plan, self.positions, shape, renumbers)

    def looks_at_attention(self) -> bool:
        """Whether its sites between decoder layers look at queries and keys of the layer before."""
        return True

    def sizes(self, shape: ModelShape, cr: float, schedule: Counts | None = None) -> Plan:
        """As `plan`, whatever tokens' positions are."""
        raise NotImplementedError

    def renumbers(self, stage: Stage) -> bool:
        """Whether the published method numbers what stays anew: before the decoder most do."""
        return stage.layer == 1

    def why_frozen(self) -> str:
        """Why the counts of this method cannot be an input of its graphs; empty where they can.

        They can where a site keeps the `live.keep` best of its tokens, in reading order, and asks
        for no other size.
        """
        return "how many tokens stay decides which operators its graphs have"

    def scoring(self, layer: int) -> str:
        """What a site behind a layer (1-based) computes, by a name: sites of one name take as long
        as each other."""
        return type(self).__module__.rpartition(".")[2]

    def largest_topk(self, plan: Plan) -> int:
        """How many tokens the method puts in order at once, at most; a target may have a limit."""
        own = (stage.survivors for stage in plan.stages if stage.site != "encoder")
        return max(own, default=0)

    def merge_in_block(self, signals: BlockSignals, stage: Stage) -> BlockMerge | None:
        """What an encoder block merges between attention and MLP, at a stage with site `block`;
        stage.merged patches leave the last block."""
        raise SpecError(f"{type(self).__module__} does not merge inside the encoder")

    def vision(self, signals: VisionSignals, stage: Stage) -> Selection:
        """What leaves the vision encoder: stage.keep + stage.merged tokens, before projection."""
        raise SpecError(f"{type(self).__module__} does not prune in the vision encoder")

    def input(self, signals: InputSignals, stage: Stage, live: Stage) -> Selection:
        """What enters layer 1: live.keep + live.merged tokens.

        `live` is the stage with the sizes of this call, at most the live tokens: in the decoder's
        graph they are symbolic, and all 0 where a call has no image.
        """
        raise SpecError(f"{type(self).__module__} does not prune at the decoder's input")

    def layer(self, signals: LayerSignals, stage: Stage, live: Stage) -> Selection:
        """What enters stage.layer, seen from the layer before: live.keep + live.merged tokens."""
        raise SpecError(f"{type(self).__module__} does not prune in the decoder")

    def calibration_scores(self, layer: int, signals: LayerSignals) -> Tensor:
        """Calibration's scores of `layer` (1-based): float32 [visual]; the largest stay longest."""
        return signals.last_query_attention()
