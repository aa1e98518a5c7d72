"""The encoder for some patches of a frame: eager model, graphs, engines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeprune.bundle import Bundle
from edgeprune.cli import main
from edgeprune.errors import ParityError
from edgeprune.export.check import check_graph
from edgeprune.export.frame_parity import check_frames
from edgeprune.graphs import DELTA
from edgeprune.making import make
from edgeprune.models import Adapter, open_model
from edgeprune.models._eager import Eager
from edgeprune.models._encoder import Encoder
from edgeprune.models._frames import Frame, FrameEncoder, Known, frame_encoder
from edgeprune.models._processor import random_prompt
from edgeprune.patches import as_patches
from edgeprune.policies import make as policy_of
from edgeprune.recipe import Recipe
from edgeprune.runtime import Engine
from edgeprune.runtime.frames import DeltaOptions
from edgeprune.spec import Plan
from tests.cameras import METHOD, noise, with_patches
from tests.fake_gpu import FakeGpu, pretend


@pytest.fixture
def engine(camera_bundle: Path) -> Iterator[Engine]:
    with Engine.open(camera_bundle, threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def adapter(camera_checkpoint: Path) -> Adapter:
    return open_model(str(camera_checkpoint))


def vision_of(adapter: Adapter, plan: Plan | None = None) -> Any:
    """The eager model."""
    shape = adapter.shape
    with torch.device("meta"):
        module = adapter.vision(policy_of(METHOD), plan or Plan(shape.visual_tokens, shape.layers))
    return adapter.load(module)


@torch.no_grad()
def test_the_first_block_is_exact_and_nothing_changes_where_nothing_did(adapter: Adapter) -> None:
    """Keys and values of a first block are of each token alone, so those that changed get from it
    what they would get in the whole frame."""
    vision = vision_of(adapter)
    encoder: Encoder = vision.encoder
    frames = frame_encoder(vision)
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(1, 3, 56, 56, generator=generator)
    indices = np.array([1, 6, 7, 15])
    after = torch.from_numpy(with_patches(before.numpy(), indices, 1))

    def through(now: torch.Tensor) -> tuple[list[Frame], Any, Any]:
        """Frames of the whole and of the changed patches after each block, and both ends."""
        given = as_patches(now[0].numpy(), 14)[indices], indices
        old, new = frames.enter(before), frames.enter_changed(*map(torch.from_numpy, given))
        found = list[Frame]()
        for number in range(len(encoder.blocks)):
            old = frames.advance(number, old)
            new = frames.advance(number, new, old.cache)
            found.append(new)
        seen = frames.leave(old)
        return found, seen, frames.leave(new, Known(seen.features, seen.query))

    plain = encoder(before)
    _, seen, same = through(before)
    for name in ("features", "cls", "query", "key"):
        assert torch.equal(getattr(seen, name), getattr(plain, name))
        assert torch.allclose(getattr(same, name), getattr(plain, name), atol=1e-5)
    blocks, _, changed = through(after)
    exact = frames.advance(0, frames.enter(after))
    rows = [0, *(indices + 1)]
    assert torch.allclose(blocks[0].hidden, exact.hidden[:, rows], atol=1e-5)
    assert exact.cache is not None and blocks[0].cache is not None
    assert torch.allclose(blocks[0].cache[0], exact.cache[0], atol=1e-5)
    moved = (changed.features - plain.features).abs().amax((0, 2)) > 1e-6
    assert moved.nonzero().flatten().tolist() == indices.tolist()
    whole = encoder(after).features
    near, stale = ((x.features - whole).norm() for x in (changed, plain))
    assert near < 0.5 * stale


@torch.no_grad()
def test_frames_are_those_of_the_eager_model(engine: Engine, adapter: Adapter) -> None:
    """Three frames; each is encoded with what was made of the one before."""
    prune = engine.manifest.prune
    vision = vision_of(adapter, prune.plan)
    frames, encoder = frame_encoder(vision), vision.encoder
    camera = engine.camera(DeltaOptions(0.01))
    pixels = noise(engine)
    first = engine.encode_frame(camera, pixels)
    assert (first.patches_encoded, first.tiles_encoded) == (16, 1)
    plain = engine.encode_pixels(pixels)
    assert first.visual.numpy().tobytes() == plain.visual.numpy().tobytes(), "to the bit"
    frame, caches = frames.enter(torch.from_numpy(pixels)), []
    for number in range(len(encoder.blocks)):
        frame = frames.advance(number, frame)
        caches.append(frame.cache)
    seen = frames.leave(frame)
    for step, indices in enumerate(([3, 4, 8, 14], [0, 3, 5, 9], [2, 3, 4, 15]), 1):
        pixels = with_patches(pixels, indices, step)
        image = engine.encode_frame(camera, pixels, ("a warning",))
        assert (image.patches_encoded, image.warnings) == (4, ("a warning",))
        at = np.array(indices)
        given = as_patches(pixels[0], 14)[at], at
        frame = frames.enter_changed(*map(torch.from_numpy, given))
        for number in range(len(encoder.blocks)):
            frame = frames.advance(number, frame, caches[number])
            caches[number] = frame.cache
        seen = frames.leave(frame, Known(seen.features, seen.query))
        visual, kept = vision.select(seen)
        assert image.kept.tolist() == kept.tolist()
        np.testing.assert_allclose(image.visual.numpy(), visual.numpy(), atol=1e-5)
    again = engine.encode_frame(camera, pixels)
    assert (again.patches_encoded, again.visual is image.visual) == (0, True)


def test_a_graph_that_is_not_the_reference_is_refused(
    camera_bundle: Path, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Bundle.open(camera_bundle, verify=False).manifest
    eager = Eager(adapter, policy_of(METHOD), manifest.prune.plan)
    prompts = [random_prompt(adapter.pixels, adapter.shape.vocabulary, seed) for seed in (0, 1)]

    def checked() -> float:
        return check_frames(camera_bundle, manifest.graphs, eager, prompts, wide=False)

    assert 0 < checked() < 1e-5
    assert manifest.parity.delta == pytest.approx(checked(), rel=0.5)
    enter, leave = FrameEncoder.enter_changed, FrameEncoder.leave
    monkeypatch.setattr(FrameEncoder, "enter_changed", lambda own, x, at: enter(own, x, at.roll(1)))
    with pytest.raises(ParityError, match=r"vision_delta\.onnx differs .* in the encoder.s input"):
        checked()
    monkeypatch.undo()

    def without(own: FrameEncoder, frame: Frame, known: Known | None = None) -> Any:
        return leave(own, frame, known and replace(known, features=0 * known.features))

    monkeypatch.setattr(FrameEncoder, "leave", without)
    with pytest.raises(ParityError, match=r"vision_delta\.onnx differs .* in the visual tokens"):
        checked()


def on_a_gpu(device: FakeGpu, engines: tuple[Engine, Engine]) -> None:
    """Frames on a GPU of numpy arrays are those of ONNX Runtime, and need no more and more room."""
    cameras = [engine.camera(DeltaOptions(0.01)) for engine in engines]
    pixels, held = noise(engines[0]), list[int]()
    for step in range(4):
        pixels = with_patches(pixels, [step, 7, 11], step)
        images = [
            engine.encode_frame(camera, pixels)
            for engine, camera in zip(engines, cameras, strict=True)
        ]
        assert images[0].patches_encoded == images[1].patches_encoded == (4 if step else 16)
        assert images[0].kept.tolist() == images[1].kept.tolist()
        visual = images[0].visual.numpy()
        assert device.view(images[1].visual, visual.nbytes).tobytes() == visual.tobytes()
        held.append(len(device.blocks))
    assert held[1] == held[-1]


def test_caches_stay_on_the_gpu(camera_bundle: Path, gpus: list[FakeGpu]) -> None:
    engines = Engine.open(camera_bundle, threads=1), Engine.open(camera_bundle, "trt")
    (device,) = gpus
    on_a_gpu(device, engines)
    camera = engines[1].camera(DeltaOptions(0.01))
    pixels = noise(engines[0])
    engines[1].encode_frame(camera, pixels)
    before = device.uploaded, device.downloaded
    image = engines[1].encode_frame(camera, with_patches(pixels, [1, 2, 3, 4], 1))
    after = device.uploaded, device.downloaded
    moved = [b - a for a, b in zip(before, after, strict=True)]
    assert moved == [4 * 4 * 3 * 14 * 14 + 8 * 4, 8 * image.kept.size]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["rtx", "jetpack7", "jetpack6"])
def test_engines_take_it(
    target: str, camera_checkpoint: Path, gpus: list[FakeGpu], tmp_path: Path
) -> None:
    """In half precision, in every dialect."""
    made = make(Recipe(METHOD, tmp_path / "b", str(camera_checkpoint), target=target, delta=0.25))
    verdicts = [v for v in check_graph(made.path / DELTA) if target in v.target.names]
    assert verdicts and not any(v.problems for v in verdicts)
    pretend(made.path)
    engines = Engine.open(made.path), Engine.open(made.path, "trt")
    on_a_gpu(gpus[0], engines)


@pytest.mark.slow
def test_tensorrt_rtx_compiles_it(camera_checkpoint: Path, tmp_path: Path) -> None:
    path = make(
        Recipe(METHOD, tmp_path / "b", str(camera_checkpoint), target="rtx", delta=0.25)
    ).path
    assert main(["build", str(path), "--backend", "trt-rtx", "--text-capacity", "64"]) == 0
    assert list((path / "engines").glob("*/vision_delta.engine"))
