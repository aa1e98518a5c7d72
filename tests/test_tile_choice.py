"""`--tiles N`: of an image's tiles those that show most are encoded, as they are among all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edgeprune.bundle import Bundle, read_manifest
from edgeprune.cli import main
from edgeprune.errors import BundleError, SpecError
from edgeprune.models import load, open_model
from edgeprune.models._media import InputOptions
from edgeprune.models._processor import Processor
from edgeprune.runtime import Sampling, Session
from edgeprune.tile_choice import chosen
from edgeprune.tiling import Size, Tiling
from tests import families
from tests.conftest import Refused
from tests.families import QUESTION
from tests.frozen import frozen
from tests.test_families import generated, prompted

SIZE = Size(112, 168)
"""Two rows of three tiles of 56 pixels."""
FULL = (1, 3)
"""Tiles that show something, counted from 0."""
TILING = Tiling("stretch", 2, 3, *SIZE, 56, 2, "last", (1.5,), kept=2)


def scene() -> Image.Image:
    """Grey ground, with something in two of the tiles."""
    levels = np.full((*SIZE, 3), 128, np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (7, 7, 3), np.uint8)
    drawn = np.asarray(Image.fromarray(noise).resize((56, 56), Image.Resampling.BICUBIC))
    for tile, part in zip(FULL, (drawn, drawn[::-1]), strict=True):
        row, column = divmod(tile, 3)
        levels[row * 56 : row * 56 + 56, column * 56 : column * 56 + 56] = part
    return Image.fromarray(levels)


@pytest.fixture(scope="module")
def family() -> families.Family:
    return families.internvl()


@pytest.fixture(scope="module")
def checkpoint(family: families.Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family.save(tmp_path_factory.mktemp("internvl") / "tiny")


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by the command, parity checked."""
    output = tmp_path_factory.mktemp("bundles") / "three"
    asked = ["--model", str(checkpoint), "--image-size", "168x112", "--tiles", "2"]
    assert main(["export", *asked, "--method", "none", "--parity", "2", "-o", str(output)]) == 0
    return output


def test_tiles_that_show_most_are_chosen_in_reading_order() -> None:
    pixels = np.zeros((7, 3, 56, 56), np.float32)
    pixels[4], pixels[0, :, :20], pixels[2, :, :9] = 1, 2, 2
    pixels[6] = 9  # the view of the whole
    assert np.array_equal(chosen(pixels, TILING), pixels[[0, 4, 6]])
    assert np.array_equal(chosen(pixels, replace(TILING, kept=3)), pixels[[0, 2, 4, 6]])
    assert np.array_equal(chosen(pixels[:6], replace(TILING, overview="none")), pixels[[0, 4]])
    moved = pixels[[6, 0, 1, 2, 3, 4, 5]]
    assert np.array_equal(chosen(moved, replace(TILING, overview="first")), pixels[[6, 0, 4]])
    pixels[:] = 0
    pixels[:] += np.arange(7)[:, None, None, None] // 6
    assert np.array_equal(chosen(pixels, TILING), pixels[[0, 1, 6]]), "of equal ones the first"


def test_features_of_chosen_tiles_are_those_among_all(
    bundle: Path, checkpoint: Path, tmp_path: Path
) -> None:
    dense = frozen(tmp_path / "dense", "none", model=checkpoint, size=SIZE)
    with Session.open(dense, threads=1) as all_tiles, Session.open(bundle, threads=1) as session:
        image, whole = session.engine.encode_image(scene()), all_tiles.engine.encode_image(scene())
        manifest = session.manifest
        seen, wanted = image.visual.numpy(), whole.visual.numpy()
    assert (image.tiles_encoded, whole.tiles_encoded) == (3, 4), "plain tiles are equal"
    tokens = seen.shape[1] // 3
    rows = [tile * tokens + token for tile in (*FULL, 6) for token in range(tokens)]
    assert np.abs(seen - wanted[:, rows]).max() <= 1e-6 * np.abs(wanted).max()
    assert manifest.encoder.share == pytest.approx(3 / 7)
    assert (manifest.encoder.tiles, manifest.prune.visual_tokens) == (3, 3 * tokens)


def test_transformers_answers_the_same_about_these_tiles(
    family: families.Family, checkpoint: Path, bundle: Path
) -> None:
    adapter = open_model(str(checkpoint), size=SIZE, tiles=2)
    every = family.look(scene())["pixel_values"]
    kept = every[[*FULL, 6]]
    pixels = Processor(adapter)(scene(), QUESTION).pixels
    assert torch.equal(pixels, kept)
    wanted = generated(family, adapter, prompted(adapter, pixels.numpy()), pixel_values=kept)
    with Session.open(bundle, threads=1) as session:
        answer = session.ask(scene(), QUESTION, Sampling(max_new_tokens=32))
    assert list(answer.ids) == wanted


def test_commands_name_the_choice(
    bundle: Path, checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = "2 of the 6 tiles of an image are encoded, and the view of the whole"
    assert main(["check", str(bundle)]) == 0
    assert said in capfd.readouterr().out
    asked = ["--model", str(checkpoint), "--image-size", "168x112", "--tiles", "2"]
    assert main(["models", *asked]) == 0
    assert said in capfd.readouterr().out


@pytest.mark.parametrize(
    ("tiles", "says"),
    [
        (0, "--tiles is at least 1; got 0"),
        (6, "--tiles 6 leaves out none of an image's 6"),
    ],
)
def test_a_choice_of_none_is_refused(
    tiles: int, says: str, checkpoint: Path, tmp_path: Path, refused: Refused
) -> None:
    asked = ["--model", checkpoint, "--image-size", "168x112", "--tiles", tiles]
    assert says in refused("export", *asked, "-o", tmp_path / "no")


REASONS = {
    "llava": "an image is not cut into tiles",
    "llava_next": "rows of visual tokens run across tiles and end with a newline",
    "llava_onevision": "rows of visual tokens run across tiles",
    "smolvlm": "its prompts name row and column of each tile",
    "lfm2_vl": "its prompts name row and column of each tile",
    "qwen2_vl": "an image is not cut into tiles",
}


@pytest.mark.parametrize("name", REASONS)
def test_families_that_need_all_tiles_refuse_and_say_why(name: str) -> None:
    takes, asked = load(name).takes, InputOptions(tiles=2)
    with pytest.raises(SpecError, match=f"--tiles is not for {name}: {REASONS[name]}"):
        asked.check(name, takes)


def test_the_command_refuses_in_one_line(tmp_path: Path, refused: Refused) -> None:
    said = refused("export", "--tiles", 2, "-o", tmp_path / "no")
    assert "--tiles is not for llava: an image is not cut into tiles; leave it out" in said


def test_a_manifest_with_more_tiles_than_there_are_is_damaged(bundle: Path, tmp_path: Path) -> None:
    record = json.loads((bundle / "manifest.json").read_text())
    assert Bundle.open(bundle).manifest.image.tiling == replace(
        TILING, ratios=tuple(record["image"]["tiling"]["ratios"])
    )
    record["image"]["tiling"]["kept"] = 6
    (tmp_path / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(BundleError, match="6 of 6 tiles by stretch"):
        read_manifest(tmp_path)
