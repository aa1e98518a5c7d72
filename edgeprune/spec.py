"""What is asked for (PruneSpec), what a model is (ModelShape) and what will be done (Plan).

Words: V visual tokens, L decoder layers, r_l the visual tokens that enter layer l (1-based), so
what its attention, its MLP and its KV cache pay for. CR = V * L / (r_1 + ... + r_L), always.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from edgeprune.errors import SpecError
from edgeprune.records import Amount, Few

Site = Literal["encoder", "block", "vision", "input", "layer"]
Positions = Literal["keep", "renumber"]

AUTO = "auto"
"""The value of an option that a method settles by itself."""


@dataclass(frozen=True, slots=True)
class PruneSpec:
    """A method, the compression ratio asked of it, and its options by name."""

    method: str
    cr: float = 1.0
    seed: int = 0
    options: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not math.isfinite(self.cr) or self.cr < 1:
            raise SpecError(
                f"--cr is how many times fewer visual tokens the decoder sees, a number of at"
                f" least 1; got {self.cr:g}"
            )

    @property
    def exact(self) -> bool:
        """Whether the counts are given, and the ratio follows from them."""
        return self.options.get("counts", AUTO) != AUTO


@dataclass(frozen=True, slots=True)
class LinearAttention:
    """Sizes of linear attention by the gated delta rule (arXiv 2412.06464) in place of attention.

    A value head has a matrix [key_size, value_size] as its state. A key head serves as many value
    heads that follow each other as there are more of these.
    """

    key_heads: Few
    value_heads: Few
    key_size: Few  # of a head
    value_size: Few

    @property
    def channels(self) -> int:
        """Of queries, keys and values together, which a short convolution goes over."""
        return 2 * self.key_heads * self.key_size + self.inner

    @property
    def inner(self) -> int:
        """Width of all value heads."""
        return self.value_heads * self.value_size

    @property
    def matrices(self) -> tuple[int, int, int]:
        """Shape of the state."""
        return self.value_heads, self.key_size, self.value_size

    @property
    def numbers(self) -> int:
        """Of the state."""
        return math.prod(self.matrices)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a vision-language model that planning needs; all are counts, none is bytes."""

    family: str
    visual_tokens: int  # V, for one frozen input size
    grid: tuple[int, int]  # rows, columns: the raster that the V tokens are read in
    layers: int  # L
    width: int  # D, of the decoder
    mlp_width: int
    attention_heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    max_positions: int
    has_cls: bool
    separators: int = 0  # of the V tokens, those that the model puts between tiles' own
    mrope: bool = False  # whether a token has three positions
    one_position: bool = False  # whether all tokens of an image have the same
    blocks: int = 0  # encoder blocks that may merge tokens: 0 where V are not one tile's patches
    convolutions: tuple[int, ...] = ()  # layers with a short convolution in place of attention
    kernel: int = 0  # tokens that these read; 0 where there are none
    linear: LinearAttention | None = None  # behind these convolutions; None: they stand alone
    output_gate: bool = False  # whether what attention gives is gated
    after_encoder: int = 0  # visual tokens that the encoder gives where --encoder lets patches go
    # for good; 0: all V

    @property
    def encoded(self) -> int:
        """Visual tokens that the encoder gives."""
        return self.after_encoder or self.visual_tokens

    @property
    def least_ratio(self) -> float:
        """The CR where nothing is pruned behind the encoder."""
        return self.visual_tokens / self.encoded

    def behind_encoder(self) -> ModelShape:
        """The same with the tokens that the encoder gives as all V, in no raster where some left:
        what a method behind it has to choose from."""
        if not self.after_encoder:
            return self
        grid = 1, self.after_encoder
        return replace(self, visual_tokens=self.after_encoder, grid=grid, after_encoder=0)

    def ratio_behind(self, cr: float) -> float:
        """The ratio of what the encoder gives that makes `cr` of all V; SpecError where fewer are
        left than that allows."""
        if not self.after_encoder:
            return cr
        found = cr / self.least_ratio
        if found < 1 - 1e-3:
            raise SpecError(
                f"--cr {cr:g}: --encoder leaves {self.encoded} of {self.visual_tokens} visual"
                f" tokens, which is CR {self.least_ratio:.4g} already; ask for that or more, or"
                " choose a larger keep"
            )
        return 1.0 if found < 1 + 1e-3 else found

    def attending(self, layer: int) -> int:
        """The layer behind which a method that looks at attention drops tokens, where it would do
        so behind `layer`: this one, or where it has no attention the next one below L that has, or
        else the last."""
        found = [n for n in range(1, self.layers) if n not in self.convolutions]
        if not found:
            raise SpecError("no layer of this decoder but the last has attention to look at")
        return next((n for n in found if n >= layer), found[-1])


@dataclass(frozen=True, slots=True)
class Stage:
    """At one site, `keep` visual tokens stay and `merged` new ones are added.

    `layer` is the 1-based decoder layer that the survivors enter; 1 before the decoder. A stage at
    the decoder's input that looks at the `text` too runs in the decoder's graph, as layers do; all
    other stages before the decoder run in the vision graph. Where a later stage treats some of
    the kept tokens in another way, they stand first and `lead` is their number. Behind a stage
    between layers that does `renumber`, tokens take the positions of their slots in the cache.
    """

    site: Site
    keep: Amount
    merged: Amount = 0
    layer: Few = 1
    text: bool = False
    lead: Amount = 0
    renumber: bool = False

    @property
    def in_decoder(self) -> bool:
        """Whether the decoder's graph holds it."""
        return self.site == "layer" or self.text

    @property
    def survivors(self) -> int:
        return self.keep + self.merged


@dataclass(frozen=True, slots=True)
class Plan:
    """The sizes of a policy, fixed before tracing: stages in the order that tokens meet them."""

    visual_tokens: int
    layers: int
    stages: tuple[Stage, ...] = ()
    dialed: bool = False  # whether counts are an input of the graphs; these are the largest then

    def __post_init__(self) -> None:
        live, layer = self.visual_tokens, 0
        for stage in self.stages:
            if stage.layer < layer or not 1 <= stage.layer <= self.layers:
                raise SpecError(f"stages must rise from layer 1 to {self.layers}; got {stage}")
            if stage.survivors > live or min(stage.keep, stage.merged) < 0:
                raise SpecError(
                    f"a stage cannot leave {stage.survivors} visual tokens where {live} are alive"
                )
            live, layer = stage.survivors, stage.layer

    @property
    def counts(self) -> tuple[int, ...]:
        """r_1 ... r_L."""
        counts, live = [], self.visual_tokens
        for layer in range(1, self.layers + 1):
            for stage in self.stages:
                if stage.layer == layer:
                    live = stage.survivors
            counts.append(live)
        return tuple(counts)

    @property
    def cr(self) -> float:
        """CR = V * L / sum of r_l; infinite when every visual token is gone."""
        total = sum(self.counts)
        return self.visual_tokens * self.layers / total if total else math.inf

    @property
    def entering(self) -> int:
        """r_1: visual tokens that enter the decoder's first layer."""
        return self.counts[0]

    @property
    def keeps_positions(self) -> bool:
        """Whether some of the V tokens enter the decoder, each at its position among the V."""
        first = [stage for stage in self.stages if stage.layer == 1]
        return bool(first) and not any(stage.renumber for stage in first)

    @property
    def span(self) -> int:
        """Positions that an image takes where a token has one."""
        return self.visual_tokens if self.keeps_positions else self.entering

    @property
    def encoded(self) -> int:
        """Visual tokens that leave the vision graph: r_1, or more where the text prunes too."""
        before = self.before_decoder()
        return before[-1].survivors if before else self.visual_tokens

    @property
    def in_decoder(self) -> tuple[Stage, ...]:
        """The stages in the decoder's graph, in layer order."""
        return tuple(stage for stage in self.stages if stage.in_decoder)

    def before_decoder(self) -> tuple[Stage, ...]:
        """The stages in the vision graph."""
        return tuple(s for s in self.stages if s.layer == 1 and not s.in_decoder)

    def behind_encoder(self) -> tuple[Stage, ...]:
        """Those of them that choose among what the encoder gives, so that their sizes may be an
        input."""
        return tuple(stage for stage in self.before_decoder() if stage.site != "encoder")

    def with_text(self) -> Stage | None:
        """The stage before layer 1 that looks at the text, if there is one."""
        return next((s for s in self.stages if s.layer == 1 and s.text), None)

    def entering_layer(self, layer: int) -> Stage | None:
        """The stage between layers `layer` - 1 and `layer`, if there is one (`layer` >= 2)."""
        return next((s for s in self.stages if s.layer == layer and s.site == "layer"), None)


def budget(visual_tokens: int, layers: int, cr: float) -> int:
    """Sum of r_l that a compression ratio allows: V * L / CR, to the nearest token."""
    return round(visual_tokens * layers / cr)


def floor_cr(visual_tokens: int, layers: int, total: int) -> float:
    """The CR of so many tokens over all layers, rounded so that asking for it is not too much."""
    return math.floor(100 * visual_tokens * layers / total) / 100


def plan_from_counts(visual_tokens: int, counts: tuple[int, ...], first: Site = "vision") -> Plan:
    """A plan whose layer l is entered by counts[l-1] tokens; a stage only where the count falls."""
    stages, live = [], visual_tokens
    for layer, count in enumerate(counts, start=1):
        if count != live:
            stages.append(Stage(first if layer == 1 else "layer", count, layer=layer))
        live = count
    return Plan(visual_tokens, len(counts), tuple(stages))


def flat_plan(
    visual_tokens: int, layers: int, cr: float, site: Site = "vision", text: bool = False
) -> Plan:
    """A plan that prunes once, before the decoder: every layer is entered by V / CR tokens."""
    keep = max(1, round(visual_tokens / cr))
    stages = (Stage(site, keep, text=text),) if keep != visual_tokens else ()
    return Plan(visual_tokens, layers, stages)


def check_reach(spec: PruneSpec, shape: ModelShape) -> None:
    """SpecError, before anything slow, where a ratio leaves less than a token per layer."""
    if spec.cr > shape.visual_tokens:
        raise SpecError(
            f"--cr {spec.cr:g} leaves less than one visual token per layer; this model has"
            f" {shape.visual_tokens}, so --cr is at most {shape.visual_tokens}"
        )


def check_separators(plan: Plan, shape: ModelShape) -> None:
    """SpecError where the vision graph would have to drop tokens that are no tile's."""
    for stage in (s for s in plan.stages if s.site == "vision"):
        if stage.survivors <= shape.separators:
            raise SpecError(
                f"this model puts {shape.separators} tokens of its own between those of the"
                f" image, so {stage.survivors} are too few; choose a smaller --cr"
            )


def merging_plan(shape: ModelShape, cr: float, share: float, site: Site = "vision") -> Plan:
    """As `flat_plan`, `share` of the tokens that a method decides on being merged ones.

    It does not decide on separators, which are kept.
    """
    total = max(1, round(shape.visual_tokens / cr))
    if total == shape.visual_tokens:
        return Plan(shape.visual_tokens, shape.layers)
    decided = max(1, total - shape.separators)
    merged = decided if share == 1 else min(round(share * decided), decided - 1)
    return Plan(shape.visual_tokens, shape.layers, (Stage(site, total - merged, merged),))


def check_cr(plan: Plan, asked: float) -> None:
    """Raise SpecError unless the plan's token total is within one token per layer of V * L / CR."""
    total, wanted = sum(plan.counts), budget(plan.visual_tokens, plan.layers, asked)
    if abs(total - wanted) > plan.layers:
        raise SpecError(
            f"--cr {asked:g} allows {wanted} visual tokens over {plan.layers} layers, this method"
            f" needs {total} (CR {plan.cr:.3g}); choose another --cr or another method"
        )
