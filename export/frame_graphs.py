"""The encoder as two graphs for a fixed camera: of a whole tile, and of K patches of one.

Both give keys and values of every block, which the second reads of the frame before. Weights are
those of one module, so a bundle holds them once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgeprune.errors import SpecError
from edgeprune.export.trace import End, Traced, record_of, to_graph
from edgeprune.graphs import DELTA, KNOWN, VISION
from edgeprune.lowering import Lowering
from edgeprune.manifest import DeltaRecord
from edgeprune.models import Adapter
from edgeprune.models._encoder import EncoderConfig
from edgeprune.models._frames import (
    ChangedConfig,
    Frame,
    FrameEncoder,
    KeyValue,
    Known,
    changed_config,
    changed_operations,
)
from edgeprune.models._qwen_tower import TowerConfig
from edgeprune.models._vision_tower import Tower
from edgeprune.spec import Plan


def changed_of(
    adapter: Adapter, plan: Plan, lowering: Lowering, share: float | None
) -> ChangedConfig | None:
    """How many patches are encoded of a frame of which few changed, None where all always are;
    SpecError where the model, the method or the weights allow no such form."""
    if share is None:
        return None
    video = adapter.asked.frames is not None
    changed = changed_config(adapter.vision_config, share, video=video)
    if any(stage.site == "block" for stage in plan.before_decoder()):
        raise SpecError(
            "--delta: this method merges patches in the encoder's blocks; leave it out, or choose"
            " another method"
        )
    if (wanted := lowering.weights.vision) != "float":
        raise SpecError(f"--delta keeps the vision tower in floats; leave out vision={wanted}")
    return changed


def delta_record(
    encoder: EncoderConfig | TowerConfig, changed: ChangedConfig | None
) -> DeltaRecord | None:
    """What the manifest says of the encoder for some patches of a tile."""
    if changed is None:
        return None
    operations = changed_operations(encoder, changed.patches)
    return DeltaRecord(changed.patches, changed.unit, encoder.patch, encoder.heads, operations)


class _OfFrame(nn.Module):
    """Gives signals of these roles, then each block's keys and values, then its hidden states."""

    def __init__(self, encoder: Tower, heads: int, roles: Sequence[str]) -> None:
        super().__init__()
        self.encoder, self.roles, self.frames = encoder, roles, FrameEncoder(encoder, heads)

    def through(
        self, frame: Frame, caches: Sequence[KeyValue | None], known: Known | None
    ) -> tuple[Tensor, ...]:
        """A frame through all blocks."""
        states, kept = [frame.hidden], list[Tensor]()
        for number, cache in enumerate(caches):
            frame = self.frames.advance(number, frame, cache)
            assert frame.cache is not None  # behind a block
            kept += frame.cache
            states.append(frame.hidden)
        signals = self.frames.leave(frame, known).signals
        return (*(signals[role] for role in self.roles), *kept, *states)


class WholeFrame(_OfFrame):
    """All patches."""

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return self.through(self.frames.enter(pixels), [None] * len(self.encoder.blocks), None)


class ChangedPatches(_OfFrame):
    """K patches; of the others `previous` signals and the caches of the frame before are known."""

    def forward(
        self,
        patches: Tensor,
        indices: Tensor,
        previous: Sequence[Tensor],
        caches: Sequence[KeyValue],
    ) -> tuple[Tensor, ...]:
        roles = [role for role in KNOWN if role in self.roles]
        known = dict(zip(roles, previous, strict=True))
        frame = self.frames.enter_changed(patches, indices)
        return self.through(frame, caches, Known(**known))


@dataclass(frozen=True)
class FrameSizes:
    """What both graphs are traced for."""

    pixels: tuple[int, ...]  # [1, 3, H, W]
    patches: int  # K
    dtype: torch.dtype
    opset: int


def frame_graphs(
    encoder: Tower,
    config: EncoderConfig | TowerConfig,
    signals: Mapping[str, Tensor],
    sizes: FrameSizes,
) -> tuple[dict[str, Traced], dict[str, nn.Module]]:
    """Both graphs by their file, and the modules that they are of; every size is fixed. `signals`
    are stand-ins for those that are read."""
    roles, dtype = list(signals), sizes.dtype
    whole, changed = (of(encoder, config.heads, roles) for of in (WholeFrame, ChangedPatches))
    known = [role for role in KNOWN if role in signals]
    count, patches = sizes.patches, config.patches
    shape = 1, config.heads, patches + encoder.first, config.width // config.heads
    caches = [tuple(torch.zeros(shape, dtype=dtype) for _ in range(2)) for _ in encoder.blocks]
    given = (
        torch.zeros(count, 3, config.patch, config.patch, dtype=dtype),
        torch.arange(count),
        [torch.zeros_like(signals[role]) for role in known],
        caches,
    )
    inputs = [End(name, name) for name in ("patches", "patch_indices")]
    inputs += [End(f"previous_{role}", f"previous_{role}") for role in known]
    inputs += _caches("past", len(caches))
    outputs = [End(role, role) for role in roles] + _caches("present", len(caches))
    ends = {VISION: [End("pixels", "pixels")], DELTA: inputs}
    args = {VISION: (torch.zeros(*sizes.pixels, dtype=dtype),), DELTA: given}
    modules: dict[str, nn.Module] = {VISION: whole, DELTA: changed}
    traced = dict[str, Traced]()
    for name, module in modules.items():
        states = 1 + len(caches)
        model = to_graph(module, args[name], None, ends[name], outputs, sizes.opset, states=states)
        traced[name] = Traced(model, record_of(model.graph, ends[name], outputs))
    return traced, modules


def _caches(prefix: str, blocks: int) -> list[End]:
    """Keys and values of every block."""
    return [
        End(f"{prefix}_{kind}.{number}", f"{prefix}_{kind}", number + 1)
        for number in range(blocks)
        for kind in ("key", "value")
    ]
