"""Parity of the encoder for a fixed camera: both of its graphs against the eager reference.

A whole frame goes through vision.onnx. Then K of its patches are replaced by those of another
sample, and they go through vision_delta.onnx with what the first graph gave. The eager model does
the same with what it gave itself. After each block hidden states, keys and values of both frames
are compared, at the end all signals.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from edgeprune.errors import ParityError
from edgeprune.export.dialogue import REPORT, Played, WindowedGraph
from edgeprune.export.ties import TOLERANCE, difference
from edgeprune.export.trace import HIDDEN
from edgeprune.export.windows import Window
from edgeprune.graphs import DELTA, VISION, GraphRecord
from edgeprune.models._eager import Eager
from edgeprune.models._frames import Frame, FrameEncoder, Known, frame_encoder
from edgeprune.models._processor import Prompt
from edgeprune.models._vision_tower import Encoded
from edgeprune.patches import as_patches

MOST = 2
"""Samples that are compared at most: every number of a block is kept of each."""

Shown = tuple[Tensor, ...]


@dataclass(frozen=True)
class Change:
    """A tile, and K patches of the next one."""

    pixels: Tensor  # [1, 3, H, W]
    patches: Tensor  # [K, 3, patch, patch]
    indices: Tensor  # int64 [K]

    @classmethod
    def drawn(cls, before: Tensor, after: Tensor, patch: int, count: int, seed: int) -> Change:
        """With patches at random places."""
        patches = torch.from_numpy(as_patches(after[0].numpy(), patch))
        generator = torch.Generator().manual_seed(seed)
        indices = torch.randperm(len(patches), generator=generator)[:count].sort().values
        return cls(before, patches[indices], indices)


class FrameGraph(WindowedGraph):
    """One of the two graphs. A stage shows hidden states and the block's keys and values, the last
    one the signals."""

    past: Mapping[str, Tensor]

    def play(self, inputs: dict[str, Tensor], past: Mapping[str, Tensor]) -> list[Shown]:
        """What each stage shows; `past` are the caches that are read, by name."""
        self.past = past
        played, shown = self.begin([inputs]), list[Shown]()
        for number in range(len(self.windows)):
            with self.opened(number) as run:
                played = run(played)
            shown += played.shown
        return shown

    def _caches(self, window: Window, played: Played) -> dict[str, Tensor]:
        return {name: cache for name, cache in self.past.items() if name in window.inputs}

    def _shown(self, stage: int, found: Sequence[dict[str, Tensor]]) -> Shown:
        (values,), last = found, self.cut.stages - 1
        names = [t.name for t in self.record.outputs if t.layer == stage]
        if stage == last:
            return tuple(values[t.name] for t in self.record.outputs if t.layer is None)
        return values[f"{HIDDEN}{stage}"], *(values[name] for name in names)

    def _chosen(self, stage: int, values: dict[str, Tensor]) -> Shown:
        return ()


@dataclass(frozen=True)
class _Pair:
    """A frame and the next one in the eager model, between two blocks."""

    change: Change
    whole: Frame | Encoded | None = None
    changed: Frame | Encoded | None = None


def check_frames(
    folder: Path,
    records: Mapping[str, GraphRecord],
    eager: Eager,
    prompts: Sequence[Prompt],
    report: Callable[[int, int], None] = lambda done, total: None,
    *,
    wide: bool,
) -> float:
    """The largest difference of the second graph's signals, as a share of the largest value;
    ParityError where any number differs by more than TOLERANCE. Graphs and `eager` compute in
    float32: `wide` says that the bundle does not."""
    stages = eager.vision
    windows, counts = stages.windows(), eager.plan.counts
    graphs = {
        name: FrameGraph(folder / name, records[name], windows, counts, wide=wide)
        for name in (VISION, DELTA)
    }
    taken = records[DELTA].input("patches")
    assert taken is not None
    count, _, patch, _ = taken.shape({})
    samples, worst = prompts[:MOST], 0.0
    for number, prompt in enumerate(samples):
        before, *others = torch.split(prompt.pixels, 1)  # tiles
        if len(prompts) > 1:
            others = list(torch.split(prompts[(number + 1) % len(prompts)].pixels, 1))
        after = others[0] if others else before.flip(-1)
        change = Change.drawn(before, after, patch, count, number)
        shown = _played(graphs, change)
        worst = max(worst, _compared(eager, change, shown, records))
        report(number + 1, len(samples))
    return worst


def _played(graphs: Mapping[str, FrameGraph], change: Change) -> dict[str, list[Shown]]:
    """What both graphs show of a sample, stage by stage."""
    whole, changed = graphs[VISION], graphs[DELTA]
    before = whole.play({"pixels": change.pixels.float()}, {})
    given = {"patches": change.patches.float(), "patch_indices": change.indices}
    signals = [t.role for t in whole.record.outputs if t.layer is None]
    for role, value in zip(signals, before[-1], strict=True):
        given[f"previous_{role}"] = value  # those that the graph does not take are not read
    past = dict[str, Tensor]()
    for cache in changed.record.caches:
        past[cache.past.name] = before[cache.index + 1][1 + (cache.past.role == "past_value")]
    return {VISION: before, DELTA: changed.play(given, past)}


@torch.no_grad()
def _compared(
    eager: Eager,
    change: Change,
    shown: Mapping[str, list[Shown]],
    records: Mapping[str, GraphRecord],
) -> float:
    """The difference of the second graph's signals, once every number of both was compared."""
    stages, pair = eager.vision, _Pair(change)
    frames, blocks = frame_encoder(stages.vision), len(stages.vision.encoder.blocks)
    roles = [t.role for t in records[VISION].outputs if t.layer is None]
    apart = 0.0
    for window in stages.windows():
        with stages.loaded(window):
            for stage in window:
                step = partial(_step, frames, stage, blocks)
                pair = stages.execution.run(step, pair)
                for name, state in ((VISION, pair.whole), (DELTA, pair.changed)):
                    wanted = _numbers(state, roles)
                    found = zip(shown[name][stage], wanted, strict=True)
                    apart = max(difference(*both) for both in found)
                    if not apart <= TOLERANCE:  # so of NaN too
                        raise ParityError(
                            f"{name} differs from the eager reference by {apart:.2e}, at most"
                            f" {TOLERANCE:g} is right, in {stages.titles[stage]}; nothing was"
                            f" written. {REPORT}"
                        )
    return apart


def _step(frames: FrameEncoder, stage: int, blocks: int, pair: _Pair) -> _Pair:
    """Both frames through a stage of the eager model."""
    change, whole, changed = pair.change, pair.whole, pair.changed
    if stage == 0:
        given = change.patches, change.indices
        return _Pair(change, frames.enter(change.pixels), frames.enter_changed(*given))
    assert isinstance(whole, Frame) and isinstance(changed, Frame)
    if stage <= blocks:
        whole = frames.advance(stage - 1, whole)
        return _Pair(change, whole, frames.advance(stage - 1, changed, whole.cache))
    seen = frames.leave(whole)
    return _Pair(change, seen, frames.leave(changed, Known.of(seen)))


def _numbers(state: Frame | Encoded | None, roles: Sequence[str]) -> Shown:
    """What is compared of a frame."""
    assert state is not None
    if isinstance(state, Encoded):
        return tuple(state.signals[role] for role in roles)
    return (state.hidden, *(state.cache or ()))
