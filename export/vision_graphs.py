"""The vision side as two graphs: the encoder for one tile, and what joins all tiles.

Attention of an encoder is within a tile, or within frames that are encoded as one. So a tile whose
pixels did not change need not be encoded again, and the result is the same to the bit: it is the
same graph, of the same sizes, on the same numbers. What looks at all tiles is in the second graph:
reading order, policies that prune before the decoder, projector, fixed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from edgeprune.export.frame_graphs import FrameSizes, frame_graphs
from edgeprune.export.trace import End, Traced, name_sizes, record_of, to_graph
from edgeprune.graphs import JOIN, VISION
from edgeprune.models._vision import Vision
from edgeprune.models._vision_tower import Encoded


class Tile(nn.Module):
    """The encoder, for one tile; it gives signals of these roles, then its hidden states."""

    def __init__(self, vision: Vision, roles: Sequence[str]) -> None:
        super().__init__()
        self.encoder, self.roles, self.merge = vision.encoder, roles, vision.merge_in_encoder

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        seen: Encoded = self.encoder(pixels, self.merge)
        signals = seen.signals
        return (*(signals[role] for role in self.roles), *seen.states)


class Join(nn.Module):
    """All but the encoder, under its own names."""

    def __init__(self, vision: Vision, roles: Sequence[str], resampled: bool) -> None:
        super().__init__()
        self.vision, self.roles, self.resampled = [vision], roles, resampled  # no submodule
        for name in ("projector", "deepstack", "fixed"):
            if (part := getattr(vision, name, None)) is not None:
                self.add_module(name, part)

    def forward(self, *given: Tensor) -> tuple[Tensor, Tensor]:
        """Signals, role by role of all tiles, and where they are an input the counts -> visual
        tokens [1, r_1, output], indices [r_1]."""
        (vision,) = self.vision
        signals, counts = (given[:-1], given[-1]) if vision.counted else (given, None)
        count = len(signals) // len(self.roles)
        rows = [signals[i : i + count] for i in range(0, len(signals), count)]
        found = {
            role: tiles[0] if role == "merged" else torch.cat(tiles)
            for role, tiles in zip(self.roles, rows, strict=True)
        }
        middle = found.get("middle")
        parts = () if middle is None else middle.chunk(len(vision.config.deepstack), dim=-1)
        seen = Encoded(
            found["features"],
            found.get("cls"),
            found.get("query"),
            found.get("key"),
            found.get("merged"),
            tuple(parts),
            self.resampled,
            units=found.get("units"),
        )
        return vision.select(seen, counts)


@dataclass(frozen=True)
class VisionGraphs:
    """The graphs by their file, and the modules that they are of."""

    traced: dict[str, Traced]
    modules: dict[str, nn.Module]


def vision_graphs(
    vision: Vision, pixels: Sequence[int], dtype: torch.dtype, opset: int, patches: int = 0
) -> VisionGraphs:
    """Trace both; every size is fixed, but for r_1 where counts are an input. `pixels` is the shape
    of all tiles, [tiles, 3, H, W].

    pixels [frames, 3, H, W] -> signals of the tile; those of every tile -> visual [1, r_1, D],
    visual_indices [r_1]. Signals that nothing reads are left out. With `patches` there is also a
    graph for so many patches of a frame of which few changed.
    """
    spans = vision.config.encoder.spans
    tiles, shape = pixels[0] // spans, (spans, *pixels[1:])
    given, resampled = _shapes(vision, shape, dtype)
    roles, joined = _join(Join(vision, list(given), resampled), given, tiles, opset)
    modules: dict[str, nn.Module] = {JOIN: Join(vision, roles, resampled)}
    if patches:
        sizes, signals = FrameSizes(shape, patches, dtype, opset), {r: given[r] for r in roles}
        traced, own = frame_graphs(vision.encoder, vision.config.encoder, signals, sizes)
        return VisionGraphs(traced | {JOIN: joined}, own | modules)
    tile, states = Tile(vision, roles), 1 + len(vision.encoder.blocks)
    outputs = [End(role, role) for role in roles]
    inputs, one = [End("pixels", "pixels")], torch.zeros(*shape, dtype=dtype)
    model = to_graph(tile, (one,), None, inputs, outputs, opset, states=states)
    traced = {VISION: Traced(model, record_of(model.graph, inputs, outputs)), JOIN: joined}
    return VisionGraphs(traced, {VISION: tile, **modules})


def _join(
    module: Join, given: dict[str, Tensor], tiles: int, opset: int
) -> tuple[list[str], Traced]:
    """The second graph, and the roles of the signals that it reads."""
    args = [torch.zeros_like(x) for x in given.values() for _ in range(tiles)]  # none twice
    inputs = [End(f"{role}.{tile}", role, tile=tile + 1) for role in given for tile in range(tiles)]
    (vision,) = module.vision
    if vision.counted:
        args.append(torch.tensor(vision.plan.counts))
        inputs.append(End("counts", "counts"))
    outputs = [End("visual", "visual"), End("visual_indices", "visual_indices")]
    model = to_graph(module, tuple(args), None, inputs, outputs, opset)
    name_sizes(model.graph.outputs, outputs)
    values = dict(zip((end.name for end in inputs), list(model.graph.inputs), strict=True))
    read = {end.role for end in inputs if values[end.name].uses()}
    for end in inputs:
        if end.role not in read:
            model.graph.inputs.remove(values[end.name])
    kept = [end for end in inputs if end.role in read]
    return [r for r in given if r in read], Traced(model, record_of(model.graph, kept, outputs))


def _shapes(
    vision: Vision, shape: Sequence[int], dtype: torch.dtype
) -> tuple[dict[str, Tensor], bool]:
    """Stand-ins for what the encoder gives for a tile, and whether that is of resampled tokens;
    nothing is computed."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        seen = vision.encoder(torch.zeros(*shape, dtype=dtype), vision.merge_in_encoder)
        found = {r: (tuple(x.shape), x.dtype) for r, x in seen.signals.items()}
    made = {role: torch.zeros(size, dtype=kind) for role, (size, kind) in found.items()}
    return made, seen.resampled
