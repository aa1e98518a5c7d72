"""The signature of a bundle's graphs, as data: what goes in, what comes out, and what each is for.

Export writes it into the manifest; the runtime and `build` bind inputs and outputs by role. So a
new input is a role and a source of its values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Annotated

from edgeprune.lowering import DTYPES
from edgeprune.records import Amount, Few, Matches, OneOf

ROLES = {
    "pixels": "a normalised tile, or frames that are encoded as one [frames, 3, height, width]",
    "features": "the encoder's output for a tile's patches [1, patches, width]",
    "cls": "its output for [CLS] [1, 1, width]",
    "query": "queries of the block that methods look at [1, heads, tokens, head]",
    "key": "keys of that block",
    "middle": "outputs of middle blocks that are read, beside each other",
    "merged": "int64 [patches]: the patch that each token was, where some were merged",
    "units": "int64 [1, tokens]: a tile's tokens that are left, where others left for good",
    "patches": "normalised pixels of the patches that changed [K, 3, patch, patch]",
    "patch_indices": "int64 [K]: which of the N patches of a tile they are",
    "previous_features": "`features` of the tile before",
    "previous_query": "`query` of the tile before",
    "previous_middle": "`middle` of the tile before",
    "visual": "visual tokens between the graphs [1, encoded, width], DeepStack rows beside them",
    "visual_indices": "int64 [encoded]: index among the V visual tokens that each of them has",
    "prefix_ids": "int64 [1, P]: text before the image",
    "text_ids": "int64 [1, T]: text after it, or of a later turn",
    "position": "int64 [1]: of the first token of the call",
    "lengths": "int64 [layers]: tokens in each layer's cache before the call",
    "counts": "int64 [layers]: r_1 ... r_L, in bundles with several ratios",
    "past_key": "keys of a layer, or encoder block, before the call [1, kv_heads, tokens, head]",
    "past_value": "values of it before the call",
    "present_key": "keys of it after the call",
    "present_value": "values of it after the call",
    "past_state": "what a layer's convolution keeps before the call [1, rows, channels]",
    "present_state": "and after it",
    "past_recurrent_state": "what linear attention keeps before it [1, heads, key, value]",
    "present_recurrent_state": "and after it",
    "logits": "of the last token [1, 1, vocabulary]",
    "token": "int64 [1, 1]: the likeliest next token, below 0 where the logits are not finite",
    "kept": "int64 [r_l]: index of each survivor among the tokens alive before the site",
}
"""What a tensor of a graph is for. The runtime knows these; others are refused by name."""

STATES = "past_state", "past_recurrent_state"
"""Roles of what layers without attention keep."""

VISION, JOIN, DECODER = "vision.onnx", "join.onnx", "decoder.onnx"
GRAPHS = VISION, JOIN, DECODER
"""In the order in which they run: the first for each tile by itself, so that a tile that was seen
before need not run again; the second joins what it gave for all tiles."""
SIGNALS = "features", "cls", "query", "key", "middle", "merged", "units"
"""Roles of what goes from the first graph to the second, each for every tile."""
DELTA = "vision_delta.onnx"
"""The encoder for K patches of a frame whose others are known, in bundles that were exported with
--delta. vision.onnx then gives keys and values of every block too."""
KNOWN = "features", "query", "middle"
"""Signals of which patches that are not encoded keep their rows."""
BLOCK = "encoder_block.onnx"
"""One block of the encoder for any number of patches, in bundles that were exported to be timed."""
ENCODER_SITE, DECODER_SITE, LAYER = "encoder_site", "decoder_site", "layer"
"""Components of the model that are other graphs of such bundles."""
SIZES = {**{dtype.name: dtype.bytes for dtype in DTYPES.values()}, "int64": 8}  # bytes

Size = Amount | Annotated[str, Matches(r"[a-z]+(\.\d{1,4})?", "the name of an open size")]


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One input or output; a size that is open until the call has a name, such as `text`."""

    name: Annotated[str, Matches(r"[a-z_]+(\.\d{1,4})?", "the name of an input or output")]
    dtype: Annotated[str, OneOf(tuple(SIZES))]
    dims: tuple[Size, ...]
    role: Annotated[str, OneOf(tuple(ROLES))]
    layer: Few | None = None  # 1-based: of a cache, or the layer that a site's survivors enter
    tile: Few | None = None  # 1-based: whose signal it is, where there is one for each

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The dims with every open size taken from `sizes`."""
        return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in self.dims)

    def bytes(self, sizes: Mapping[str, int]) -> int:
        return prod(self.shape(sizes)) * SIZES[self.dtype]

    @property
    def cached(self) -> tuple[str, int]:
        """What a cache holds and of which layer, such as key and 1, before a call or after it."""
        assert self.layer is not None  # a cache is of a layer
        return self.role.partition("_")[2], self.layer


@dataclass(frozen=True, slots=True)
class PartRecord:
    """A part of the model as a graph of its own, which runs only to be timed.

    `kind` is what parts of equal cost share: of an encoder site its method and what chooses, of a
    decoder site what scores, of a decoder layer what it has in place of attention, if anything.
    """

    file: str
    component: Annotated[str, OneOf((ENCODER_SITE, DECODER_SITE, LAYER))]
    kind: str
    kept: Amount = 0  # units of a tile that go on, at an encoder site


@dataclass(frozen=True, slots=True)
class CacheRecord:
    """The keys, the values or a state of one layer: the input that is read, the output that is
    written."""

    past: TensorRecord
    present: TensorRecord

    @property
    def is_state(self) -> bool:
        """Whether its size is the same however many tokens were read."""
        return self.past.role in STATES

    @property
    def index(self) -> int:
        """Of its layer, from 0."""
        assert self.past.layer is not None  # a cache is of a layer
        return self.past.layer - 1


@dataclass(frozen=True, slots=True)
class GraphRecord:
    """All inputs and outputs of one graph, in the graph's order."""

    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]

    def input(self, role: str) -> TensorRecord | None:
        """The input of a role, where the graph has one."""
        return next((tensor for tensor in self.inputs if tensor.role == role), None)

    def output(self, role: str) -> TensorRecord | None:
        """The output of a role, where the graph has one."""
        return next((tensor for tensor in self.outputs if tensor.role == role), None)

    @property
    def kept(self) -> tuple[TensorRecord, ...]:
        """The outputs that say which tokens each pruning site kept, in layer order."""
        return tuple(tensor for tensor in self.outputs if tensor.role == "kept")

    @property
    def caches(self) -> tuple[CacheRecord, ...]:
        """The KV caches and the states, in the order of the inputs."""
        return tuple(self._caches())

    @property
    def cached_layers(self) -> tuple[int, ...]:
        """Indices of the layers that keep keys and values, whose number of tokens is open."""
        return tuple(dict.fromkeys(cache.index for cache in self.caches if not cache.is_state))

    def _caches(self) -> Iterator[CacheRecord]:
        written = {(tensor.role, tensor.layer): tensor for tensor in self.outputs}
        for past in self.inputs:
            if past.role.startswith("past_"):
                present = written["present_" + past.role.removeprefix("past_"), past.layer]
                yield CacheRecord(past, present)
