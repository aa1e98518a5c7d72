"""Of a fixed camera's frames only patches that changed are encoded: which, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgeprune.bundle import Bundle
from edgeprune.cli import main
from edgeprune.errors import BackendError, BundleError
from edgeprune.graphs import DELTA
from edgeprune.patches import as_patches
from edgeprune.runtime import Engine
from edgeprune.runtime.backend import ChangedPatches, EncodedTile
from edgeprune.runtime.frames import DeltaOptions, part_means
from tests import families
from tests.cameras import Counting, noise, with_patches
from tests.conftest import Refused
from tests.hostile import edit_graph


@pytest.fixture
def engine(camera_bundle: Path) -> Iterator[Engine]:
    with Engine.open(camera_bundle, threads=1) as engine:
        yield engine


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


@pytest.mark.parametrize(
    ("patch", "height", "width"), [(14, 56, 84), (16, 50, 64), (15, 31, 47), (1, 3, 4)]
)
def test_means_are_of_the_parts_of_each_patch(patch: int, height: int, width: int) -> None:
    """Of patches of an odd size, and where the tile's edge is no whole patch, less is looked at."""
    pixels = np.random.default_rng(0).standard_normal((3, height, width), np.float32)
    columns, parts = width // patch, min(2, patch)
    side, found = patch // parts, part_means(pixels, patch)
    for number, patch_pixels in enumerate(as_patches(pixels, patch)):
        row, column = divmod(number, columns)
        cut = pixels[:, patch * row :, patch * column :][:, :patch, :patch]
        assert (patch_pixels == cut).all()
        split = cut[:, : parts * side, : parts * side].reshape(3, parts, side, parts, side)
        np.testing.assert_allclose(found[number], split.mean((2, 4)).flatten(), atol=1e-6)
    some = np.array([len(found) - 1, 0])
    assert (as_patches(pixels, patch, some) == as_patches(pixels, patch)[some]).all()


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


def test_keys_and_values_are_written_where_they_lie(engine: Engine) -> None:
    camera, pixels = engine.camera(DeltaOptions(0.01)), noise(engine)

    def addresses() -> set[int]:
        (known,) = camera._known
        assert known is not None and known.tile.caches is not None
        return {value.data_ptr() for value in known.tile.caches.values()}

    engine.encode_frame(camera, pixels)
    before = addresses()
    image = engine.encode_frame(camera, with_patches(pixels, [5], 1))
    assert image.patches_encoded == 4 and addresses() == before


def test_after_an_error_a_frame_is_encoded_as_a_whole(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values may be half written then."""
    camera, pixels = engine.camera(DeltaOptions(0.01)), noise(engine)
    engine.encode_frame(camera, pixels)
    other = with_patches(pixels, [5], 1)

    def failing(tile: EncodedTile, changed: ChangedPatches) -> EncodedTile:
        raise BackendError("no memory")

    with monkeypatch.context() as patch, pytest.raises(BackendError):
        patch.setattr(engine.backend, "encode_changed", failing)
        engine.encode_frame(camera, other)
    image = engine.encode_frame(camera, other)
    assert (image.patches_encoded, image.tiles_encoded) == (16, 1)
    assert image.visual.numpy().tobytes() == engine.encode_pixels(other).visual.numpy().tobytes()


def test_after_an_error_of_the_join_no_old_image_is_taken(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    camera, pixels = engine.camera(DeltaOptions(0.01)), noise(engine)
    old = engine.encode_frame(camera, pixels)
    other = with_patches(pixels, [5], 1)
    with monkeypatch.context() as patch, pytest.raises(BackendError):
        patch.setattr(engine.backend, "join", failing_join)
        engine.encode_frame(camera, other)
    image = engine.encode_frame(camera, other)
    assert image.patches_encoded == 0, "its patches are known"
    assert image.visual.numpy().tobytes() != old.visual.numpy().tobytes()


def failing_join(tiles: Any, counts: Any = None) -> Any:
    raise BackendError("no memory")


def test_watch_encodes_what_changed(
    camera_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = Image.effect_noise((56, 56), 40).convert("RGB")
    for name, box in (("a", None), ("b", None), ("c", (14, 14)), ("d", (14, 14))):
        frame = scene.copy()
        if box:
            frame.paste((255, 0, 0), (*box, 28, 28))
        frame.save(tmp_path / f"{name}.png")
    options = ["--prompt", "what ?", "--max-new-tokens", "1", "--threads", "1"]
    command = ["watch", str(camera_bundle), str(tmp_path), *options]
    assert main([*command, "--delta", "0.02", "--refresh", "3"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["patches_encoded"] for line in lines] == [16, 0, 4, 16]
    assert main(command) == 0
    assert "patches_encoded" not in capsys.readouterr().out


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
    refused: Refused, tmp_path: Path, tiny_bundle: Path, camera_bundle: Path
) -> None:
    families.video_llava().save(tmp_path / "video")
    options = ["--method", "none", "--delta", "0.25", "-o", tmp_path / "b"]
    line = refused("export", "--model", tmp_path / "video", "--frames", "4", *options)
    assert "this bundle takes a video" in line
    ask = [tmp_path, "--prompt", "what ?"]
    assert "export it with --delta" in refused("watch", tiny_bundle, *ask, "--delta", "0.02")
    assert "--refresh is for --delta" in refused("watch", camera_bundle, *ask, "--refresh", "5")
    assert "a number of frames" in refused(
        "watch", camera_bundle, *ask, "--delta", "0.02", "--refresh", "0"
    )
    assert "from 0 to 1" in refused("watch", camera_bundle, *ask, "--delta", "2")


def test_a_manifest_that_says_otherwise_is_refused(camera_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(camera_bundle, tmp_path / "b"))
    file = copy / "manifest.json"
    text = file.read_text()
    for change, why in (
        ({"delta": None}, "graphs are vision.onnx, join.onnx, decoder.onnx"),
        (
            {"delta": {"patches": 16, "unit": 1, "patch": 14, "heads": 4, "operations": 1}},
            "are not some",
        ),
        (
            {"delta": {"patches": 4, "unit": 1, "patch": 7, "heads": 4, "operations": 1}},
            "make no tile",
        ),
        (
            {"delta": {"patches": 4, "unit": 1, "patch": 14, "heads": 5, "operations": 1}},
            "no 5 heads",
        ),
        (
            {"delta": {"patches": 5, "unit": 1, "patch": 14, "heads": 4, "operations": 1}},
            "its sizes say",
        ),
        ({"tiles": 2}, "are encoded of a video"),
        ({"delta": {"patches": 4, "unit": 3, "patch": 14, "heads": 4, "operations": 1}}, "fill no"),
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
