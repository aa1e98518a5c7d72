"""Frames of a fixed camera through every tower: some patches encoded, the others known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.schedules import planned
from edgeprune.bundle import Bundle
from edgeprune.cli import main
from edgeprune.errors import SpecError
from edgeprune.export.check import check_graph
from edgeprune.export.exporter import ExportRequest, export
from edgeprune.graphs import DELTA
from edgeprune.models import Adapter, open_model
from edgeprune.models._frames import Frame, Known, changed_config, frame_encoder
from edgeprune.models._processor import Processor, random_prompt
from edgeprune.models._vision import Vision
from edgeprune.models._vision_tower import Encoded
from edgeprune.patches import as_patches
from edgeprune.policies import make
from edgeprune.runtime import Engine
from edgeprune.runtime.backend import ChangedPatches
from edgeprune.runtime.frames import DeltaOptions
from edgeprune.spec import Plan, PruneSpec
from edgeprune.tiling import Size
from tests import qwen
from tests.cameras import Counting, noise, with_patches
from tests.encoder_sites import TOWERS as ALL
from tests.essence import essence

VIDEOS = {"qwen2_vl", "llava_next_video", "llava_onevision_video", "video_llava"}
TOWERS: dict[str, Callable[[Path], Adapter]] = {
    name: build for name, build in ALL.items() if name not in VIDEOS
} | {"qwen2_vl": lambda f: open_model(str(qwen.plain_checkpoint(f)), size=Size(84, 112))}
"""Those of images."""
ALWAYS = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "lfm2_vl", "granite_vision"}
NONE = PruneSpec("none")


def vision_of(adapter: Adapter) -> Vision:
    """The eager model."""
    shape = adapter.shape
    with torch.device("meta"):
        module = adapter.vision(make(NONE), Plan(shape.visual_tokens, shape.layers))
    return adapter.load(module)


class Change:
    """A tile, another one, and a third that is the first with patches of the second."""

    def __init__(self, vision: Vision, indices: Any) -> None:
        encoder = vision.config.encoder
        self.vision, self.tower, self.patch = vision, vision.encoder, encoder.patch
        self.indices = np.array(indices)
        generator = torch.Generator().manual_seed(0)
        size = 1, 3, *encoder.size
        self.before = torch.randn(size, generator=generator)
        other = torch.randn(size, generator=generator)
        columns = encoder.size[1] // self.patch
        self.after, side = self.before.clone(), self.patch
        for row, column in (divmod(int(index), columns) for index in indices):
            at = slice(side * row, side * (row + 1)), slice(side * column, side * (column + 1))
            self.after[..., at[0], at[1]] = other[..., at[0], at[1]]

    def encoded(self, after: Tensor) -> tuple[Encoded, Encoded]:
        """The first tile as a whole, and patches of `after` with what is known of it."""
        frames = frame_encoder(self.vision)
        patches = as_patches(after[0].numpy(), self.patch)
        given = patches[self.indices], self.indices
        whole, some = frames.enter(self.before), frames.enter_changed(*map(torch.from_numpy, given))
        for number in range(len(self.tower.blocks)):
            whole = frames.advance(number, whole)
            some = frames.advance(number, some, whole.cache)
        seen = frames.leave(whole)
        return seen, frames.leave(some, Known.of(seen))

    def reference(self) -> Encoded:
        """Every block on all tokens, after which those that are not encoded have the states of the
        frame before again."""
        tower, order = self.tower, self.tower.order
        patches = torch.arange(len(as_patches(self.before[0].numpy(), self.patch)))
        sequence = patches if order is None else torch.tensor(order)
        chosen = torch.isin(sequence, torch.from_numpy(self.indices))
        encoded = torch.cat([torch.ones(tower.first, dtype=torch.bool), chosen])

        def mixed(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(encoded[None, :, None], new, old)

        old, new = tower.enter(self.before), tower.enter(self.after)
        for number in range(len(tower.blocks)):
            old, new = (tower.run_block(number, state, None) for state in (old, new))
            new = replace(
                new,
                hidden=mixed(new.hidden, old.hidden),
                read=tuple(map(mixed, new.read, old.read)),
            )
        return tower.leave(new)


def near(found: Encoded, wanted: Encoded) -> None:
    """Equal to 1e-5 of the largest value."""
    assert found.signals.keys() == wanted.signals.keys()
    for role, value in wanted.signals.items():
        apart = (found.signals[role] - value).abs().max() / value.abs().max()
        assert apart < 1e-5, role


@torch.no_grad()
@pytest.mark.parametrize("name", essence(TOWERS, ALWAYS))
def test_some_patches_of_every_tower(name: str, tmp_path: Path) -> None:
    adapter = TOWERS[name](tmp_path / "tiny")
    vision, count = vision_of(adapter), adapter.vision_config.encoder.patches
    some, tower = Change(vision, [1, 2, count // 2, count - 1]), vision.encoder
    whole, changed = some.encoded(some.after)
    plain = tower(some.before)
    assert all(torch.equal(x, plain.signals[role]) for role, x in whole.signals.items())
    near(changed, some.reference())
    moved = (changed.features - whole.features).abs().amax((0, 2)) > 0
    assert moved.nonzero().flatten().tolist() == some.indices.tolist()
    near(some.encoded(some.before)[1], whole)  # nothing changed
    every = Change(vision, range(count))
    near(every.encoded(every.after)[1], tower(every.after))


def camera(
    adapter: Adapter,
    folder: Path,
    spec: PruneSpec = NONE,
    *,
    target: str = "cpu",
    samples: int = 2,
    share: float = 0.25,
) -> Bundle:
    """A bundle for a fixed camera, compared with the eager reference on the way."""
    policy, why = make(spec), "" if samples else "left out by a test"
    plan = planned(policy, adapter.shape, spec.cr)
    path = folder / f"{target}"
    request = ExportRequest("tiny", spec, plan, path, target, no_parity=why, delta=share)
    vocabulary = adapter.shape.vocabulary
    prompts = [random_prompt(adapter.pixels, vocabulary, seed) for seed in range(samples)]
    return Bundle.open(export(request, adapter, policy, Processor(adapter), prompts).path)


READING = PruneSpec("visionzip", 2)
"""It reads queries and keys of all patches, of which most are those of the frame before."""


def test_frames_of_windows_and_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two frames after the first; patches that become one token are encoded together."""
    adapter = TOWERS["qwen2_5_vl"](tmp_path / "tiny")
    made = camera(adapter, tmp_path, READING)
    delta, parity = made.manifest.encoder.delta, made.manifest.parity.delta
    assert delta is not None and delta.unit == 2 and parity is not None and 0 < parity < 1e-5
    with torch.device("meta"):
        module = adapter.vision(make(READING), made.manifest.prune.plan)
    vision: Any = adapter.load(module)
    with Engine.open(made.path, threads=1) as engine, torch.no_grad():
        seen_by = Counting(engine)
        monkeypatch.setattr(engine, "backend", seen_by)
        watched, eager = engine.camera(DeltaOptions(0.01)), Eager(vision)
        pixels = noise(engine)
        engine.encode_frame(watched, pixels)
        eager.whole(pixels)
        columns = made.manifest.image.width // delta.patch
        for step, changed in enumerate((1, 4 * columns + 2), 1):
            pixels = with_patches(pixels, [changed], step)
            image = engine.encode_frame(watched, pixels)
            chosen = seen_by.given[-1]
            assert image.patches_encoded == delta.patches == chosen.indices.size
            units = {(index // columns // 2, index % columns // 2) for index in chosen.indices}
            assert 4 * len(units) == delta.patches
            assert (changed // columns // 2, changed % columns // 2) in units
            visual, kept = vision.select(eager.changed(chosen))
            assert image.kept.tolist() == kept.tolist()
            np.testing.assert_allclose(image.visual.numpy(), visual.numpy(), atol=1e-5)


class Eager:
    """Frames one after the other in the eager model."""

    def __init__(self, vision: Any) -> None:
        self.frames, self.blocks = frame_encoder(vision), len(vision.encoder.blocks)
        self.caches: list[Any] = [None] * self.blocks
        self.seen: Encoded | None = None

    def whole(self, pixels: Any) -> None:
        self._through(self.frames.enter(torch.from_numpy(pixels)))

    def changed(self, chosen: ChangedPatches) -> Encoded:
        given = chosen.pixels, chosen.indices
        return self._through(self.frames.enter_changed(*map(torch.from_numpy, given)))

    def _through(self, frame: Frame) -> Encoded:
        for number in range(self.blocks):
            frame = self.frames.advance(number, frame, self.caches[number])
            self.caches[number] = frame.cache
        known = None if self.seen is None else Known.of(self.seen)
        self.seen = self.frames.leave(frame, known)
        return self.seen


def test_each_tile_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile in which nothing changed is not encoded; one in which much did goes as a whole."""
    made = camera(TOWERS["internvl"](tmp_path / "tiny"), tmp_path, samples=1)
    record = made.manifest.encoder
    assert record.tiles > 2 and record.delta is not None
    with Engine.open(made.path, threads=1) as engine:
        seen_by = Counting(engine)
        monkeypatch.setattr(engine, "backend", seen_by)
        watched, pixels = engine.camera(DeltaOptions(0.01)), noise(engine)
        seen_by.given.clear()
        first = engine.encode_frame(watched, pixels)
        assert (
            first.visual.numpy().tobytes() == engine.encode_pixels(pixels).visual.numpy().tobytes()
        )
        seen = [(first.tiles_encoded, first.patches_encoded)]
        pixels[1] = with_patches(pixels[1:2], [0], 1)[0]
        for frame in (pixels, pixels, np.concatenate([pixels[:2], noise(engine, 1)[2:]])):
            image = engine.encode_frame(watched, frame)
            seen.append((image.tiles_encoded, image.patches_encoded))
        tiles, patches, some = record.tiles, record.patches, record.delta.patches
        later = tiles - 2
        assert seen == [(tiles, tiles * patches), (0, some), (0, 0), (later, later * patches)]
        assert len(seen_by.given) == 1
        whole = engine.encode_pixels(frame).visual.numpy()
        apart = np.abs(image.visual.numpy() - whole).max((0, 2)) > 1e-5
        (moved,) = np.nonzero(apart)
        each = record.patches // record.delta.unit**2
        assert moved.size and {*(moved // each).tolist()} == {1}, "the second tile approximately"


@pytest.mark.slow
@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("target", ["jetpack7", "jetpack6"])
def test_engines_take_every_tower(name: str, target: str, tmp_path: Path) -> None:
    first = target == "jetpack7"
    made = camera(TOWERS[name](tmp_path / "tiny"), tmp_path, target=target, samples=2 * first)
    assert (made.manifest.parity.delta is not None) == first
    for graph in (DELTA, "vision.onnx"):
        (verdict,) = (v for v in check_graph(made.file(graph)) if target in v.target.names)
        assert not verdict.problems, verdict.problems[0].message
    if first:
        assert main(["build", str(made.path), "--backend", "trt-rtx", "--text-capacity", "64"]) == 0
        assert list((made.path / "engines").glob("*/vision_delta.engine"))


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    videos = open_model(str(qwen.plain_checkpoint(tmp_path)), size=Size(56, 84), frames=4)
    with pytest.raises(SpecError, match="images of fixed cameras, this bundle takes a video"):
        changed_config(videos.vision_config, 0.25, video=True)
    image = open_model(str(tmp_path), size=Size(28, 28))
    with pytest.raises(SpecError, match="a single visual token"):
        changed_config(image.vision_config, 0.25)
    few, many = (
        changed_config(open_model(str(tmp_path), size=Size(56, 84)).vision_config, share)
        for share in (0.01, 0.99)
    )
    assert (few.patches, many.patches, few.unit) == (4, 20, 2), "whole groups, and not all"
