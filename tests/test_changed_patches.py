"""Of a fixed camera's frames only patches that changed are encoded, as the eager model does it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.shapes import write
from edgeprune.bundle import Bundle
from edgeprune.cli import main
from edgeprune.errors import BundleError, ParityError
from edgeprune.export.check import check_graph
from edgeprune.export.frame_parity import check_frames
from edgeprune.graphs import DELTA
from edgeprune.models import Adapter, open_model
from edgeprune.models._dialogues import Eager
from edgeprune.models._encoder import Encoder
from edgeprune.models._frames import Frame, FrameEncoder, Known
from edgeprune.models._processor import random_prompt
from edgeprune.policies import make as policy_of
from edgeprune.recipe import Recipe, make
from edgeprune.runtime import Engine
from edgeprune.runtime.backend import ChangedPatches
from edgeprune.runtime.frames import DeltaOptions, as_patches
from edgeprune.spec import Plan, PruneSpec
from tests import families
from tests.conftest import Refused
from tests.fake_gpu import FakeGpu, pretend
from tests.hostile import edit_graph
from tests.tiny import TINY

METHOD = PruneSpec("fastervlm", cr=2)
"""It reads queries and keys of all patches, of which most are those of the frame before."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three blocks of two heads, which make 16 visual tokens."""
    shape = replace(TINY, vision_layers=4, vision_width=128)
    return write(shape, tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 of 16 patches, compared with the eager model; for GPUs too, with engines never built."""
    folder = tmp_path_factory.mktemp("delta") / "bundle"
    options: dict[str, Any] = {"target": "rtx", "dtype": "fp32"}
    exported = make(Recipe(METHOD, folder, str(checkpoint), delta=0.25, parity=2, **options))
    assert exported.manifest.parity.samples == 2
    assert exported.manifest.parity.delta is not None
    pretend(exported.path)
    return exported.path


@pytest.fixture
def engine(bundle: Path) -> Iterator[Engine]:
    with Engine.open(bundle, threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def adapter(checkpoint: Path) -> Adapter:
    return open_model(str(checkpoint))


def vision_of(adapter: Adapter, plan: Plan | None = None) -> Any:
    """The eager model."""
    shape = adapter.shape
    with torch.device("meta"):
        module = adapter.vision(policy_of(METHOD), plan or Plan(shape.visual_tokens, shape.layers))
    return adapter.load(module)


def noise(engine: Engine, seed: int = 0) -> Any:
    shape = engine.manifest.image.shape
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def with_patches(pixels: Any, indices: Any, seed: int) -> Any:
    """A frame in which some patches are others."""
    other = np.random.default_rng(seed).standard_normal(pixels.shape, np.float32)
    side, found = 14, pixels.copy()
    columns = pixels.shape[-1] // side
    for row, column in (divmod(int(index), columns) for index in indices):
        at = ..., slice(side * row, side * (row + 1)), slice(side * column, side * (column + 1))
        found[at] = other[at]
    return found


@torch.no_grad()
def test_the_first_block_is_exact_and_nothing_changes_where_nothing_did(adapter: Adapter) -> None:
    """Keys and values of a first block are of each token alone, so those that changed get from it
    what they would get in the whole frame."""
    encoder: Encoder = vision_of(adapter).encoder
    frames = FrameEncoder(encoder)
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(1, 3, 56, 56, generator=generator)
    indices = np.array([1, 6, 7, 15])
    after = torch.from_numpy(with_patches(before.numpy(), indices, 1))

    def through(now: torch.Tensor) -> tuple[list[Frame], Any, Any]:
        """Frames of the whole and of the changed patches after each block, and both ends."""
        chosen = ChangedPatches.of(as_patches(now[0].numpy(), 14)[indices], indices, 16)
        given = (chosen.pixels, chosen.indices, chosen.sources)
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
    assert exact.key is not None and blocks[0].key is not None
    assert torch.allclose(blocks[0].key, exact.key, atol=1e-5)
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
    frames, encoder = FrameEncoder(vision.encoder), vision.encoder
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
        chosen = ChangedPatches.of(as_patches(pixels[0], 14)[at], at, 16)
        given = (chosen.pixels, chosen.indices, chosen.sources)
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


class Counting:
    """A backend that says what it was given."""

    def __init__(self, engine: Engine) -> None:
        self.backend, self.calls = engine.backend, list[tuple[int, ...]]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def encode_tile(self, pixels: Any, *, caches: bool = False) -> Any:
        self.calls.append(tuple(range(16)))
        return self.backend.encode_tile(pixels, caches=caches)

    def encode_changed(self, tile: Any, changed: ChangedPatches) -> Any:
        self.calls.append(tuple(changed.indices.tolist()))
        return self.backend.encode_changed(tile, changed)


def test_what_is_encoded_of_a_frame(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting(engine)
    monkeypatch.setattr(engine, "backend", counting)
    camera = engine.camera(DeltaOptions(0.1, refresh=6))
    counting.calls.clear()
    std = np.array(engine.manifest.image.std, np.float32)[:, None, None]
    levels = np.full(engine.manifest.image.shape, 0.5, np.float32)

    def show(change: dict[int, float]) -> list[tuple[int, ...]]:
        """What is encoded of a frame in which patches are lighter than in the last."""
        for index, more in change.items():
            row, column = divmod(index, 4)
            levels[..., 14 * row : 14 * (row + 1), 14 * column : 14 * (column + 1)] += more
        counting.calls.clear()
        engine.encode_frame(camera, levels / std)
        return list(counting.calls)

    whole = tuple(range(16))
    assert show({}) == [whole], "the first"
    assert show({3: 0.09, 5: -0.09}) == [], "as little as noise"
    (found,) = show({3: 0.02, 7: 0.2})
    assert found == (2, 3, 6, 7), "what drifts counts; and what lies next to it is encoded too"
    (found,) = show(dict.fromkeys((1, 2, 9, 10), 0.11))
    assert found == (1, 2, 9, 10)
    assert show(dict.fromkeys(range(5), 0.11)) == [whole], "more than it takes"
    assert [show({}) for _ in range(5)] == [[]] * 5
    assert show({}) == [whole], "a refresh"
    levels[..., :7, :7] += 0.2
    (found,) = show({})
    assert 0 in found, "a part of a patch is enough"


def test_noise_of_single_pixels_is_no_change(engine: Engine) -> None:
    camera, rng = engine.camera(DeltaOptions()), np.random.default_rng(0)
    std = np.array(engine.manifest.image.std, np.float32)[:, None, None]
    shape = engine.manifest.image.shape
    seen = [
        engine.encode_frame(
            camera, (0.5 + rng.normal(0, 4 / 255, shape).astype(np.float32)) / std
        ).patches_encoded
        for _ in range(4)
    ]
    assert seen == [16, 0, 0, 0]


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


def test_caches_stay_on_the_gpu(bundle: Path, gpus: list[FakeGpu]) -> None:
    engines = Engine.open(bundle, threads=1), Engine.open(bundle, "trt")
    (device,) = gpus
    on_a_gpu(device, engines)
    camera = engines[1].camera(DeltaOptions(0.01))
    pixels = noise(engines[0])
    engines[1].encode_frame(camera, pixels)
    before = device.uploaded, device.downloaded
    image = engines[1].encode_frame(camera, with_patches(pixels, [1, 2, 3, 4], 1))
    after = device.uploaded, device.downloaded
    moved = [b - a for a, b in zip(before, after, strict=True)]
    assert moved == [4 * 4 * 3 * 14 * 14 + 8 * 4 + 8 * 16, 8 * image.kept.size]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["rtx", "jetpack7", "jetpack6"])
def test_engines_take_it(
    target: str, checkpoint: Path, gpus: list[FakeGpu], tmp_path: Path
) -> None:
    """In half precision, in every dialect."""
    made = make(Recipe(METHOD, tmp_path / "b", str(checkpoint), target=target, delta=0.25))
    verdicts = [v for v in check_graph(made.path / DELTA) if target in v.target.names]
    assert verdicts and not any(v.problems for v in verdicts)
    pretend(made.path)
    engines = Engine.open(made.path), Engine.open(made.path, "trt")
    on_a_gpu(gpus[0], engines)


@pytest.mark.slow
def test_tensorrt_rtx_compiles_it(checkpoint: Path, tmp_path: Path) -> None:
    path = make(Recipe(METHOD, tmp_path / "b", str(checkpoint), target="rtx", delta=0.25)).path
    assert main(["build", str(path), "--backend", "trt-rtx", "--text-capacity", "64"]) == 0
    assert list((path / "engines").glob("*/vision_delta.engine"))


TOWERS = {
    "siglip": lambda folder: families.paligemma().save(folder),
    "internvit": lambda folder: families.internvl().save(folder),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TOWERS)
def test_towers_without_cls_and_with_gains(name: str, tmp_path: Path) -> None:
    TOWERS[name](tmp_path / "model")
    recipe = Recipe(PruneSpec("none"), tmp_path / "b", str(tmp_path / "model"), delta=0.3)
    assert make(recipe).manifest.parity.delta is not None


def test_watch_encodes_what_changed(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = Image.effect_noise((56, 56), 40).convert("RGB")
    for name, box in (("a", None), ("b", None), ("c", (14, 14)), ("d", (14, 14))):
        frame = scene.copy()
        if box:
            frame.paste((255, 0, 0), (*box, 28, 28))
        frame.save(tmp_path / f"{name}.png")
    options = ["--prompt", "what ?", "--max-new-tokens", "1", "--threads", "1"]
    command = ["watch", str(bundle), str(tmp_path), *options]
    assert main([*command, "--delta", "0.02", "--refresh", "3"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["patches_encoded"] for line in lines] == [16, 0, 4, 16]
    assert main(command) == 0
    assert "patches_encoded" not in capsys.readouterr().out


def test_a_graph_that_is_not_the_reference_is_refused(
    bundle: Path, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Bundle.open(bundle, verify=False).manifest
    eager = Eager(adapter, policy_of(METHOD), manifest.prune.plan)
    prompts = [random_prompt(adapter.pixels, adapter.shape.vocabulary, seed) for seed in (0, 1)]

    def checked() -> float:
        return check_frames(bundle, manifest.graphs, eager, prompts, wide=False)

    assert 0 < checked() < 1e-5
    enter, leave = FrameEncoder.enter_changed, FrameEncoder.leave
    monkeypatch.setattr(
        FrameEncoder, "enter_changed", lambda own, x, at, rows: enter(own, x, at, rows.roll(1))
    )
    with pytest.raises(ParityError, match=r"vision_delta\.onnx differs .* in vision blocks\.0"):
        checked()
    monkeypatch.undo()

    def without(own: FrameEncoder, frame: Frame, known: Known | None = None) -> Any:
        return leave(own, frame, known and replace(known, features=0 * known.features))

    monkeypatch.setattr(FrameEncoder, "leave", without)
    with pytest.raises(ParityError, match=r"vision_delta\.onnx differs .* in the visual tokens"):
        checked()


REFUSED = [
    (["--delta", "1.5", "--method", "none"], "a share of a frame's patches"),
    (["--delta", "0.2", "--method", "none", "--encoder", "exit"], "leave one of them out"),
    (["--delta", "0.2", "--method", "tome", "--cr", "2"], "merges patches in the encoder's blocks"),
    (
        ["--delta", "0.2", "--method", "none", "--weights", "int8:vision=int8"],
        "keeps the vision tower in floats",
    ),
]


@pytest.mark.parametrize(("options", "why"), REFUSED)
def test_what_cannot_be_is_refused_in_a_line(
    options: list[str], why: str, refused: Refused, tmp_path: Path
) -> None:
    assert why in refused("export", *options, "-o", tmp_path / "b")


def test_towers_that_cannot_are_refused_by_name(
    refused: Refused, tmp_path: Path, tiny_bundle: Path, bundle: Path
) -> None:
    families.llava_next().save(tmp_path / "next")
    options = ["--method", "none", "--delta", "0.25", "-o", tmp_path / "b"]
    line = refused("export", "--model", tmp_path / "next", "--image-size", "84x84", *options)
    assert "takes 5 tiles or frames" in line
    ask = [tmp_path, "--prompt", "what ?"]
    assert "export it with --delta" in refused("watch", tiny_bundle, *ask, "--delta", "0.02")
    assert "--refresh is for --delta" in refused("watch", bundle, *ask, "--refresh", "5")
    assert "a number of frames" in refused(
        "watch", bundle, *ask, "--delta", "0.02", "--refresh", "0"
    )
    assert "from 0 to 1" in refused("watch", bundle, *ask, "--delta", "2")


def test_a_manifest_that_says_otherwise_is_refused(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "b"))
    file = copy / "manifest.json"
    text = file.read_text()
    for change, why in (
        ({"delta": None}, "graphs are vision.onnx, join.onnx, decoder.onnx"),
        ({"delta": {"patches": 16, "patch": 14, "heads": 4, "operations": 1}}, "are not some"),
        ({"delta": {"patches": 4, "patch": 7, "heads": 4, "operations": 1}}, "make no tile"),
        ({"delta": {"patches": 4, "patch": 14, "heads": 5, "operations": 1}}, "no 5 heads"),
        ({"delta": {"patches": 5, "patch": 14, "heads": 4, "operations": 1}}, "its sizes say"),
        ({"tiles": 2}, "several tiles"),
    ):
        data = json.loads(text)
        data["encoder"] |= change
        file.write_text(json.dumps(data))
        with pytest.raises(BundleError, match=why):
            Bundle.open(copy)
    file.write_text(text)
    edit_graph(copy, DELTA, lambda model: model.graph.output.pop())
    with pytest.raises(BundleError, match=r"vision_delta\.onnx is not the graph"):
        Bundle.open(copy)
