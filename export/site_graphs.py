"""Where tokens are chosen, as graphs: an encoder site, and a decoder site between two layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from edgeprune.export.trace import End, to_graph
from edgeprune.models._decoder import Decoder
from edgeprune.models._encoder import Encoder, Encoding, Tower
from edgeprune.models._encoder_site import EncoderSite, SiteConfig
from edgeprune.models._ops import TorchOps
from edgeprune.models._sites import Prune
from edgeprune.policies import Policy
from edgeprune.policies._policy import Selection
from edgeprune.policies._signals import (
    Anchors,
    AttentionStates,
    InputSignals,
    LayerSignals,
    Segments,
)
from edgeprune.policies._sizes import given
from edgeprune.spec import Stage


class Choice(nn.Module):
    """An encoder site: patches are chosen, the others leave, and where they come back they do.

    What left stands in for what an exit's map makes of it. The map is a product, and counted by its
    operations.
    """

    def __init__(self, tower: Tower, site: SiteConfig, ops: TorchOps) -> None:
        super().__init__()
        self.tower, self.site = [tower], EncoderSite(site, ops)  # no submodule
        self.roles = ["hidden"]
        self.roles += ["pixels"] * self.site.looks_at_pixels
        self.roles += ["query", "key"] * self.site.looks_at_cls

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """The states of a tile [1, S, width], and what the site looks at beside them -> what goes
        on, and all patches again or which tokens are left."""
        (tower,), site = self.tower, self.site
        held = dict(zip(self.roles, values, strict=True))
        contrast = tower.contrast(held["pixels"], site) if "pixels" in held else None
        seen = Encoding(
            held["hidden"], query=held.get("query"), key=held.get("key"), contrast=contrast
        )
        seen = tower.split(seen, site)
        assert seen.split is not None
        if site.drops:
            units, _ = site.left_tokens(seen.split)
            return seen.hidden, units
        patches = site.config.kept_units * site.config.units.area
        kept = seen.hidden[:, seen.hidden.shape[1] - patches :]  # [CLS] stands before them
        split = replace(seen.split, mapped=(seen.split.left,))
        return seen.hidden, site.rejoin(kept, split, 0)

    def example(self, pixels: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Inputs for a tile of `pixels` [frames, 3, H, W]; nothing is computed."""
        (tower,) = self.tower
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            _, tokens, width = tower.enter(torch.zeros(*pixels, dtype=dtype)).hidden.shape
        shapes: dict[str, tuple[int, ...]] = {"hidden": (1, tokens, width), "pixels": (*pixels,)}
        if isinstance(tower, Encoder):  # of all towers, those that may have a [CLS]
            heads = tower.config.heads
            shapes["query"] = shapes["key"] = (1, heads, tokens, width // heads)
        return tuple(torch.zeros(shapes[role], dtype=dtype) for role in self.roles)


def choice_graph(
    choice: Choice, pixels: Sequence[int], dtype: torch.dtype, opset: int
) -> ir.Model:
    """The graph for a tile of `pixels` [frames, 3, H, W]; every size is fixed."""
    args = choice.example(pixels, dtype)
    inputs = [End(role, role) for role in choice.roles]
    outputs = [End("output", "hidden"), End("whole", "hidden")]
    return to_graph(choice, args, None, inputs, outputs, opset)


class Site(nn.Module):
    """A decoder site behind a layer that has attention."""

    def __init__(self, decoder: Decoder, policy: Policy, layer: int) -> None:
        super().__init__()
        self.config, self.index = decoder.config, layer - 1
        self.stage = Stage("layer", keep=2, layer=layer + 1)  # sizes are those of the inputs
        self.prune = Prune(policy, self.stage)
        self.halves = decoder.own_rotary(self.index).cos.shape[1]

    def forward(
        self,
        hidden: Tensor,  # [1, S, width], the layer's output
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        """States and positions of what goes on, and its indices among the n tokens."""
        layer = self.config.layers[self.index]
        segments = Segments(prefix_ids.shape[1], visual_indices.shape[0], text_ids.shape[1])
        visual = hidden[:, segments.prefix : segments.prefix + segments.visual]
        signals = LayerSignals(
            segments=segments,
            hidden=hidden,
            attention=AttentionStates(query, key, rotated_query, rotated_key),
            cos=cos,
            sin=sin,
            factor=self.config.rope_of(self.index).factor,
            scale=layer.scale,
            cap=layer.cap,
            past=self.config.sees != "prompt",
            rows=positions[0],
            anchors=Anchors(anchor, anchor, anchor),
            visual_tokens=0,
            inputs=InputSignals(visual, 0),
        )
        live = replace(self.stage, keep=given(count, segments.visual))
        chosen: Selection
        hidden, positions, chosen = self.prune(hidden, positions, signals, live)
        return hidden, positions, chosen.indices


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
"""Open sizes of a site's inputs, in their order."""


def site_graph(site: Site, dtype: torch.dtype, opset: int) -> ir.Model:
    """The graph for any number of tokens; inputs that the method does not look at are left out."""
    config, sizes = site.config, {"prefix": 5, "visual": 11, "text": 7, "tokens": 23, "rows": 29}
    heads = {"query": config.heads, "rotated_query": config.heads}
    shapes: dict[str, tuple[int, ...]] = {"hidden": (1, 0, config.width)}
    for name in ("query", "key", "rotated_query", "rotated_key"):
        shapes[name] = (1, heads.get(name, config.kv_heads), 0, config.head_size)
    shapes |= {name: (0, site.halves) for name in ("cos", "sin")}
    args = list[Tensor]()
    for name, axes in AXES.items():
        whole = name in ("positions", "anchor", "prefix_ids", "visual_indices", "text_ids", "count")
        shape = list(shapes.get(name, (1,) * max(1, 1 + max(axes, default=0))))
        for axis, size in axes.items():
            shape[axis] = sizes[size]
        args.append(torch.ones(shape, dtype=torch.int64 if whole else dtype))
    dynamic = tuple(dict.fromkeys(axes, Dim.DYNAMIC) for axes in AXES.values())
    inputs = [End(name, name) for name in AXES]
    outputs = [End("output", "hidden"), End("places", "positions"), End("kept", "kept")]
    model = to_graph(site, tuple(args), dynamic, inputs, outputs, opset)
    for value in list(model.graph.inputs):
        axes = AXES[value.name or ""]
        if not value.uses():
            model.graph.inputs.remove(value)
        elif value.shape is not None:
            dims = [axes.get(axis, size) for axis, size in enumerate(value.shape)]
            value.shape = ir.Shape(dims)
    return model
