"""What a decoder is, as data: its sizes, its layers, and how its weights are read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from edgeprune.models._mrope import MRope
from edgeprune.models._rope import Rope
from edgeprune.spec import LinearAttention, Plan


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """What may differ between the layers of one decoder, and between kinds of decoder."""

    activation: str = "silu"  # of the MLP's gate
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norms of queries and keys, head by head
    scale: float | None = None  # of products of queries and keys; None: head_size ** -0.5
    window: int | None = None  # how many tokens of its cache a token sees, itself the last
    rope: Rope | None = None  # None: the decoder's
    cap: float | None = None  # that scores of attention are bent towards, cap * tanh(score / cap)
    branch_norms: bool = False  # RMS norms behind attention and MLP as well as before them
    experts: bool = False  # tokens of an image have weights of their own, as has the one before it
    expert_qkv_bias: bool = False  # of these
    kernel: int = 0  # tokens that a short convolution reads in place of attention, the token itself
    # the last; 0: attention
    linear: LinearAttention | None = None  # behind that convolution; None: it stands alone
    output_gate: bool = False  # whether what attention gives is gated by the token

    @property
    def keeps(self) -> tuple[str, ...]:
        """What the layer keeps between calls: the roles in a graph end so."""
        if not self.kernel:
            return "key", "value"
        return ("state", "recurrent_state") if self.linear else ("state",)


@dataclass(frozen=True, slots=True)
class Rescale:
    """Parameters whose names begin with a pattern are factor * (what is stored) + offset."""

    pattern: str
    factor: float = 1.0
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """A LLaMA-like decoder: RMS norms before attention and a gated MLP, rotary halves.

    `sees` says what a token of a call sees beside the tokens up to itself: "past" nothing, "image"
    the image that it is a token of, "prompt" the whole call, if that has an image.
    """

    layers: tuple[LayerConfig, ...]
    width: int
    mlp_width: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    eps: float
    max_positions: int
    rope: Rope
    tied: bool = False
    head_apart: bool = False  # the head is a product like others, quantised by itself
    mrope: MRope | None = None  # None: one position a token
    deepstack: int = 0  # first layers after each of which a row is added to every visual token
    tile_of: tuple[int, ...] = ()  # of each visual token that the encoder gives, its tile; empty:
    # there is one
    rescaled: tuple[Rescale, ...] = ()  # the first that matches a parameter holds
    branch_eps: float | None = None  # of norms that do not read the residual stream; None: `eps`
    cap: float | None = None  # that logits are bent towards
    sees: Literal["past", "image", "prompt"] = "past"
    image_of: tuple[int, ...] = ()  # where it sees its image: of each of the V, the number of its
    # image, -1 for none; empty: there is one image
    one_position: bool = False  # all tokens of an image have the same position
    marks: int = 0  # rows of the embedding behind the vocabulary: what stands around an image

    @property
    def rows(self) -> int:
        """Tokens that the embedding has."""
        return self.vocabulary + self.marks

    def span(self, plan: Plan) -> int:
        """Positions that an image takes."""
        if self.one_position:
            return 1
        return plan.span if self.mrope is None else self.mrope.span

    @property
    def visual_width(self) -> int:
        """Of a visual token with the rows that are added to it beside it."""
        return self.width * (1 + self.deepstack)

    @property
    def convolutions(self) -> tuple[int, ...]:
        """Layers (1-based) with a short convolution in place of attention."""
        return tuple(number for number, layer in enumerate(self.layers, 1) if layer.kernel)

    @property
    def kernel(self) -> int:
        """Tokens that these read; 0 where there are none."""
        return max((layer.kernel for layer in self.layers), default=0)

    @property
    def linear(self) -> LinearAttention | None:
        """The linear attention behind these, where there is any."""
        return next((layer.linear for layer in self.layers if layer.linear), None)

    def kept_shapes(self, index: int, slots: int, batch: int = 1) -> tuple[tuple[int, ...], ...]:
        """Of what the layer of an index keeps: keys and values of `slots` tokens, or its state, of
        linear attention two."""
        layer = self.layers[index]
        if not layer.kernel:
            return ((batch, self.kv_heads, slots, self.head_size),) * 2
        if layer.linear is None:
            return ((batch, layer.kernel - 1, self.width),)
        return (batch, layer.kernel - 1, layer.linear.channels), (batch, *layer.linear.matrices)

    def nothing_kept(
        self, index: int, slots: int, dtype: torch.dtype, batch: int = 1
    ) -> tuple[Tensor, ...]:
        """What the layer of an index keeps before a first call, in a dtype; matrices of linear
        attention are float32 always."""
        kinds = zip(self.layers[index].keeps, self.kept_shapes(index, slots, batch), strict=True)
        wide = {"recurrent_state": torch.float32}
        return tuple(torch.zeros(shape, dtype=wide.get(kind, dtype)) for kind, shape in kinds)

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The different rotary embeddings of its layers, the decoder's own first."""
        found = (layer.rope for layer in self.layers if layer.rope is not None)
        return tuple(dict.fromkeys([self.rope, *found]))

    def rope_of(self, index: int) -> Rope:
        """The rotary embedding of the layer of an index."""
        return self.layers[index].rope or self.rope

    def rescaling(self, parameter: str) -> tuple[float, float]:
        """Factor and offset with which a parameter of the decoder is read."""
        held = (r for r in self.rescaled if re.match(r.pattern, parameter))
        return next(((r.factor, r.offset) for r in held), (1.0, 0.0))
