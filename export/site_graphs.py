"""Where tokens are chosen, as graphs: an encoder site, and a decoder site between two layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from edgeprune.export.trace import End, Shapes, to_graph
from edgeprune.models._decoder import Decoder
from edgeprune.models._encoder import Encoder
from edgeprune.models._encoder_site import EncoderSite, SiteConfig
from edgeprune.models._ops import TorchOps
from edgeprune.models._sites import Prune
from edgeprune.models._vision_tower import Encoding, Tower
from edgeprune.policies import Policy
from edgeprune.policies._signals import (
    Anchors,
    AttentionStates,
    InputSignals,
    LayerSignals,
    Segments,
)
from edgeprune.policies._sizes import given
from edgeprune.spec import Stage


class EncoderSites(nn.Module):
    """Encoder sites: patches are chosen, the others leave; with an exit they come back at the end.

    They come back unchanged: the time of an exit's map, which is a product, is counted by its
    operations. All sites are traced together, which takes no longer than tracing one.
    """

    roles = "hidden", "pixels", "query", "key"

    def __init__(self, tower: Tower, sites: Sequence[SiteConfig], ops: TorchOps) -> None:
        super().__init__()
        self.tower = [tower]  # no submodule
        self.sites = [EncoderSite(site, ops) for site in sites]

    def forward(
        self, hidden: Tensor, pixels: Tensor, query: Tensor | None, key: Tensor | None
    ) -> tuple[Tensor, ...]:
        """The states of a tile [1, S, width], its pixels, queries and keys of the block before ->
        of each site what goes on, and all patches again or which tokens are left."""
        (tower,), found = self.tower, list[Tensor]()
        for site in self.sites:
            own = tower.contrast(pixels, site)
            seen = tower.split(Encoding(hidden, query=query, key=key, contrast=own), site)
            assert seen.split is not None
            if site.drops:
                whole, _ = site.kept_tokens(seen.split)
            else:
                patches = site.config.kept_units * site.config.units.area
                kept = seen.hidden[:, seen.hidden.shape[1] - patches :]  # [CLS] stands before them
                split = replace(seen.split, mapped=(seen.split.removed_states,))
                whole = site.rejoin(kept, split, 0)
            found += [seen.hidden, whole]
        return tuple(found)

    def example(self, pixels: Sequence[int], dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """Inputs for a tile of `pixels` [frames, 3, H, W]; nothing is computed."""
        (tower,) = self.tower
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            _, tokens, width = tower.enter(torch.zeros(*pixels, dtype=dtype)).hidden.shape
        query = None
        if isinstance(tower, Encoder):  # of all towers, those that may have a [CLS]
            heads = tower.config.heads
            query = torch.zeros(1, heads, tokens, width // heads, dtype=dtype)
        hidden, image = (torch.zeros(*x, dtype=dtype) for x in ((1, tokens, width), pixels))
        return hidden, image, query, None if query is None else query.clone()


def encoder_site_graphs(
    sites: EncoderSites, pixels: Sequence[int], dtype: torch.dtype, opset: int
) -> Iterator[ir.Model]:
    """The graph of each site for a tile of `pixels` [frames, 3, H, W]; every size is fixed."""
    args = sites.example(pixels, dtype)
    inputs = [
        End(role, role) for role, arg in zip(sites.roles, args, strict=True) if arg is not None
    ]
    yield from _each(sites, args, None, inputs, ("output", "whole"), len(sites.sites), opset)


class DecoderSites(nn.Module):
    """Decoder sites behind layers that have attention, each of a policy, on the same tokens."""

    def __init__(self, decoder: Decoder, policies: Sequence[tuple[Policy, int]]) -> None:
        """Each policy with the layer (1-based) that it looks at."""
        super().__init__()
        self.config, self.layers = decoder.config, [layer for _, layer in policies]
        stages = [Stage("layer", keep=2, layer=layer + 1) for layer in self.layers]
        pairs = zip(policies, stages, strict=True)
        self.sites = [Prune(policy, stage) for (policy, _), stage in pairs]
        self.halves = decoder.own_rotary(self.layers[0] - 1).cos.shape[1]

    def forward(
        self,
        hidden: Tensor,  # [1, S, width], a layer's output
        query: Tensor,  # [1, heads, S, head], before rotary embedding
        key: Tensor,  # [1, kv_heads, S, head]
        rotated_query: Tensor,
        rotated_key: Tensor,
        cos: Tensor,  # [n, head / 2]
        sin: Tensor,
        positions: Tensor,  # int64 [1, S], rows of these
        anchor: Tensor,  # int64 [1], likewise, of the middle of the image
        prefix_ids: Tensor,  # int64 [1, P], for its size, as the next two
        visual_indices: Tensor,  # int64 [n]
        text_ids: Tensor,  # int64 [1, T]
        count: Tensor,  # int64 [1], visual tokens that go on
    ) -> tuple[Tensor, ...]:
        """Of each site states and positions of what goes on, and its indices among the n tokens."""
        segments = Segments(prefix_ids.shape[1], visual_indices.shape[0], text_ids.shape[1])
        visual = hidden[:, segments.prefix : segments.prefix + segments.visual]
        states = AttentionStates(query, key, rotated_query, rotated_key)
        found = list[Tensor]()
        for site, layer in zip(self.sites, self.layers, strict=True):
            kind = self.config.layers[layer - 1]
            signals = LayerSignals(
                segments=segments,
                hidden=hidden,
                attention=states,
                cos=cos,
                sin=sin,
                factor=self.config.rope_of(layer - 1).factor,
                scale=kind.scale,
                cap=kind.cap,
                past=self.config.sees != "prompt",
                rows=positions[0],
                anchors=Anchors(anchor, anchor, anchor),
                visual_tokens=0,
                inputs=InputSignals(visual, 0),
            )
            live = replace(site.stage, keep=given(count, segments.visual))
            kept, at, chosen = site(hidden, positions, signals, live)
            found += [kept, at, chosen.indices]
        return tuple(found)


AXES: dict[str, dict[int, str]] = {
    "hidden": {1: "tokens"},
    "query": {2: "tokens"},
    "key": {2: "tokens"},
    "rotated_query": {2: "tokens"},
    "rotated_key": {2: "tokens"},
    "cos": {0: "rows"},
    "sin": {0: "rows"},
    "positions": {1: "tokens"},
    "anchor": {},
    "prefix_ids": {1: "prefix"},
    "visual_indices": {0: "visual"},
    "text_ids": {1: "text"},
    "count": {},
}
"""Open sizes of the inputs of a decoder site, in their order."""
EXAMPLE = {"prefix": 5, "visual": 11, "text": 7, "tokens": 23, "rows": 29}


def decoder_site_graphs(sites: DecoderSites, dtype: torch.dtype, opset: int) -> Iterator[ir.Model]:
    """The graph of each site for any number of tokens."""
    config, args = sites.config, list[Tensor]()
    rows, heads = (EXAMPLE["rows"], sites.halves), dict.fromkeys(("key", "rotated_key"), True)
    for name, axes in AXES.items():
        if name == "hidden":
            shape: tuple[int, ...] = (1, EXAMPLE["tokens"], config.width)
        elif name.endswith(("query", "key")):
            count = config.kv_heads if name in heads else config.heads
            shape = (1, count, EXAMPLE["tokens"], config.head_size)
        elif name in ("cos", "sin"):
            shape = rows
        else:
            args.append(torch.ones([EXAMPLE[a] for a in axes.values()] or [1], dtype=torch.int64))
            args[-1] = args[-1][None] if 1 in axes else args[-1]
            continue
        args.append(torch.zeros(shape, dtype=dtype))
    dynamic = tuple(dict.fromkeys(axes, Dim.DYNAMIC) for axes in AXES.values())
    inputs = [End(name, name) for name in AXES]
    outputs = "output", "kept_positions", "kept_indices"
    for model in _each(sites, tuple(args), dynamic, inputs, outputs, len(sites.sites), opset):
        for value in model.graph.inputs:
            axes = AXES[value.name or ""]
            if value.shape is not None:
                dims = [axes.get(axis, size) for axis, size in enumerate(value.shape)]
                value.shape = ir.Shape(dims)
        yield model


def _each(
    module: nn.Module,
    args: tuple[Tensor | None, ...],
    shapes: Shapes,
    inputs: Sequence[End],
    names: Sequence[str],
    count: int,
    opset: int,
) -> Iterator[ir.Model]:
    """A module of `count` parts traced once, then each part's outputs, of these names, alone with
    what they are computed from."""
    numbered = [End(f"{name}.{part}", name) for part in range(count) for name in names]
    whole = ir.to_proto(to_graph(module, args, shapes, inputs, numbered, opset))
    for part in range(count):
        model = ir.from_proto(whole)
        own = {f"{name}.{part}": name for name in names}
        for value in list(model.graph.outputs):
            if value.name not in own:
                model.graph.outputs.remove(value)
        common.RemoveUnusedNodesPass()(model)
        for value in model.graph.outputs:
            value.name = own[value.name or ""]
        for value in list(model.graph.inputs):
            if not value.uses():
                model.graph.inputs.remove(value)
        yield model
