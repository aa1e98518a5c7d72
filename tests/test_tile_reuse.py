"""Tiles and frames whose pixels were seen before are not encoded again; nothing differs by that."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import watch_clip
from edgeprune.bundle import Bundle
from edgeprune.errors import SpecError
from edgeprune.making import make
from edgeprune.recipe import Recipe
from edgeprune.runtime import Engine, Session
from edgeprune.runtime.backend import EncodedImage, EncodedTile
from edgeprune.runtime.tile_encoder import TileEncoder
from edgeprune.spec import PruneSpec
from edgeprune.tiling import Size
from tests import families


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five views of an image, pruned over all of them together. Parity decodes and asks again."""
    folder = tmp_path_factory.mktemp("tiles")
    families.llava_next().save(folder / "model")
    spec = PruneSpec("vispruner", cr=2, options={"tiles": "joint"})
    exported = make(
        Recipe(spec, folder / "bundle", str(folder / "model"), image_size=Size(84, 84), parity=2)
    )
    assert exported.manifest.parity.samples == 2
    return exported.path


@pytest.fixture
def engine(bundle: Path) -> Iterator[Engine]:
    with Engine.open(bundle, threads=1) as engine:
        yield engine


def noise(engine: Engine) -> Any:
    shape = engine.manifest.image.shape
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def seen(image: EncodedImage) -> tuple[bytes, bytes]:
    """All bytes that the decoder reads of an image."""
    return image.visual.numpy().tobytes(), image.kept.tobytes()


def test_only_tiles_that_changed_are_encoded(bundle: Path, engine: Engine) -> None:
    pixels = noise(engine)
    assert engine.encode_pixels(pixels).tiles_encoded == len(pixels) == 5
    pixels[3] += 1
    again = engine.encode_pixels(pixels)
    assert again.tiles_encoded == 1
    with Engine.open(bundle, threads=1, tile_memory_mb=0) as other:
        afresh = other.encode_pixels(pixels)
        assert (afresh.tiles_encoded, other.encode_pixels(pixels).tiles_encoded) == (5, 5)
    assert seen(again) == seen(afresh), "to the bit"
    moved = engine.encode_pixels(pixels[[0, 2, 1, 3, 4]])
    assert moved.tiles_encoded == 0, "wherever a tile lies"
    assert seen(moved) != seen(again)
    same = engine.encode_pixels(pixels[[0, 2, 1, 3, 4]], ("a warning",))
    assert (same.visual is moved.visual, same.warnings) == (True, ("a warning",))
    engine.forget_tiles()
    assert engine.encode_pixels(pixels).tiles_encoded == 5


def test_equal_tiles_of_one_image_are_encoded_once(engine: Engine) -> None:
    image = engine.encode_pixels(np.zeros_like(noise(engine)))
    assert image.tiles_encoded == 1


def test_memory_is_bounded(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest

    class Counting:
        """A backend that says which tiles it encoded."""

        def __init__(self) -> None:
            self.encoded = list[float]()

        def encode_tile(self, pixels: Any) -> EncodedTile:
            self.encoded.append(float(pixels.flat[0]))
            return EncodedTile({})

        def join(self, tiles: Any, counts: Any) -> EncodedImage:
            assert len(tiles) == 5
            return EncodedImage(None, None, np.zeros(1, np.int64))

    backend: Any = Counting()
    encoder = TileEncoder(backend, manifest, 1)
    one = sum(tensor.bytes({}) for tensor in manifest.vision.outputs)
    assert encoder._limit == (1 << 20) // one
    encoder._limit = 7
    pixels = np.zeros(manifest.image.shape, np.float32)
    counts = np.array(manifest.prune.counts)

    def encode(*values: float) -> list[float]:
        """Those of five tiles that had to be encoded."""
        pixels[:] = np.array(values, np.float32)[:, None, None, None]
        backend.encoded.clear()
        encoder.encode(pixels, counts)
        assert len(encoder._known) <= 7
        return list(backend.encoded)

    assert encode(1, 2, 3, 4, 5) == [1, 2, 3, 4, 5]
    assert encode(1, 2, 6, 7, 8) == [6, 7, 8], "the longest unused one is forgotten: 3"
    assert encode(4, 5, 1, 2, 3) == [3]
    encoder._limit = 3
    assert encode(1, 2, 3, 4, 9) == [9], "what is known is looked up before any is forgotten"
    assert encode(1, 2, 3, 4, 5) == [1, 2, 5]


def test_memory_is_a_number_of_megabytes(bundle: Path) -> None:
    with pytest.raises(SpecError, match="--tile-memory is a number of megabytes from 0; got -1"):
        Engine.open(bundle, tile_memory_mb=-1)


def test_a_clip_with_one_change_is_asked_and_encoded_where_it_changed(bundle: Path) -> None:
    """A still scene of five tiles, one of which changes: it and the view of the whole."""
    with Session.open(bundle, threads=1) as session:
        found = watch_clip.measure(session, frames=6, rounds=1, tokens=2)
    assert (found["tiles"], found["tiles_that_change"], found["equal_answers"]) == (5, 2, True)
    told = {way: (found[way]["asked"], found[way]["tiles_encoded"]) for way in watch_clip.WAYS}
    assert told == {
        "every tile encoded anew": (6, 30),
        "equal tiles encoded once": (6, 7),
        "on change": (2, 7),
    }
