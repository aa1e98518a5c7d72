"""Gemma 3 with crops of an image beside the view of it: as transformers makes and writes them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Refused
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Gemma3Processor
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from edgeprune.cli import main
from edgeprune.contract import check_sizes
from edgeprune.errors import ModelError
from edgeprune.models import open_model
from edgeprune.models._processor import Processor
from edgeprune.models._reference import Reference
from edgeprune.models.gemma3 import RULE
from edgeprune.policies import make
from edgeprune.runtime import Sampling, Session
from edgeprune.runtime.images import to_pixels, warnings
from edgeprune.runtime.tiles import cropped
from edgeprune.spec import PruneSpec, plan_from_counts
from edgeprune.tiling import CropRule, Size
from tests import gemma
from tests.dense import MORE, dense
from tests.dialogues import assert_same_answers, exported
from tests.families import QUESTION, Family
from tests.frozen import frozen
from tests.test_families import block, drawn_image, generated
from tests.test_gemma import logits

LANDSCAPE, PORTRAIT = Size(60, 203), Size(90, 40)  # 3 crops of 68 pixels, the last of 67; 2
SMALL = {name: 20 if "size" in name else value for name, value in RULE.items()}
"""Crops of 20 pixels or more, for tiny images."""


@pytest.fixture(scope="module")
def family() -> Family:
    made = gemma.gemma3()
    for name, value in {**SMALL, "do_pan_and_scan": True}.items():
        setattr(made.image_processor, name, value)
    return made


@pytest.fixture(scope="module")
def checkpoint(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family.save(tmp_path_factory.mktemp("gemma3") / "tiny")


def test_one_crop_of_three_is_what_transformers_makes_of_that_crop(
    family: Family, checkpoint: Path
) -> None:
    """--tiles: prompts do not say where a crop lies. The one with something in it is chosen."""
    levels = np.full((*LANDSCAPE, 3), 128, np.uint8)
    levels[:, 70:130] = np.asarray(drawn_image(Size(60, 60)))
    image, adapter = Image.fromarray(levels), open_model(str(checkpoint), size=LANDSCAPE, tiles=1)
    record, every = adapter.image_record(Processor(adapter)), family.look([image])["pixel_values"]
    assert record.tiling is not None and (record.tiling.kept, len(every)) == (1, 4)
    pixels = to_pixels(image, record)
    np.testing.assert_array_equal(pixels, every[[0, 2]].numpy())
    prompt = Processor(adapter)(image, QUESTION)
    assert torch.equal(prompt.pixels, every[[0, 2]])
    wanted = generated(family, adapter, prompt, tokens=64, pixel_values=every[[0, 2]])
    assert dense(adapter).generate(prompt, 64, lambda token: False) == wanted


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("size", [LANDSCAPE, PORTRAIT])
def test_the_dense_model_is_that_of_transformers(
    size: Size, images: int, family: Family, checkpoint: Path
) -> None:
    """Pixels, answers of 64 tokens, and logits over two turns."""
    adapter = open_model(str(checkpoint), size=size, images=images)
    shown = [drawn_image(size, seed) for seed in range(images)]
    seen = family.look(shown)
    crops = 3 if size == LANDSCAPE else 2
    assert seen["num_crops"].tolist() == [crops] * images
    record = adapter.image_record(Processor(adapter))
    pixels = np.concatenate([to_pixels(image, record) for image in shown])
    np.testing.assert_array_equal(pixels, seen["pixel_values"].numpy())
    prompt, ours = Processor(adapter)(shown, QUESTION), dense(adapter)
    assert torch.equal(prompt.pixels, seen["pixel_values"])
    wanted = generated(family, adapter, prompt, tokens=64, **seen)
    assert ours.generate(prompt, 64, lambda token: False) == wanted
    theirs = logits(family, adapter, prompt, shown)
    torch.testing.assert_close(ours.prefill(prompt).logits, theirs[-4], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(ours.step(MORE[:, :1]).logits, theirs[-3], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("images", [1, 2])
def test_a_prompt_is_written_as_the_processor_writes_it(
    images: int, family: Family, checkpoint: Path
) -> None:
    adapter = open_model(str(checkpoint), size=LANDSCAPE, images=images)
    tokenizer = adapter.chat.tokenizer
    theirs = Gemma3Processor(
        family.image_processor, tokenizer, tokenizer.chat_template, image_seq_length=16
    )
    shown = [drawn_image(LANDSCAPE, seed) for seed in range(images)]
    content = [{"type": "image"}] * images + [{"type": "text", "text": QUESTION}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    options = {**SMALL, "do_pan_and_scan": True}
    wanted = theirs(images=[shown], text=[text], images_kwargs=options)["input_ids"][0]
    prefix, _, later = adapter.chat.split(adapter.media, QUESTION)
    assert [*prefix[0].tolist(), *block(adapter), *later[0].tolist()] == list(wanted)


def test_published_settings_are_null_and_mean_the_defaults(tmp_path: Path) -> None:
    """Those of transformers' processor; by themselves they cut nothing."""
    family = gemma.gemma3()
    folder = family.save(tmp_path)
    assert {n: v for n, v in Gemma3Processor.images_kwargs.items() if n in RULE} == RULE
    adapter = open_model(str(folder), size=Size(600, 1280))
    assert adapter.tiling is not None
    assert adapter.tiling.crops == CropRule(1.2, 256, 4)
    assert (adapter.tiling.rows, adapter.tiling.columns) == (1, 2)
    assert open_model(str(folder)).tiling is None


@settings(max_examples=50)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 600), st.integers(2, 6))
def test_the_crops_are_those_of_the_processor(
    height: int, width: int, least: int, most: int
) -> None:
    image = np.broadcast_to(np.uint8(0), (3, height, width))
    rule = CropRule(1.2, least, most)
    found = Gemma3ImageProcessorPil().pan_and_scan(image, least, most, 1.2)
    assume(all(part.size for part in found))  # transformers fails there
    rows, columns = rule.grid(Size(height, width))
    assert (rows * columns) == max(1, len(found))
    if found:
        ours = cropped(Image.new("1", (width, height)), rows, columns)
        assert [(part.height, part.width) for part in ours] == [part.shape[1:] for part in found]


def test_an_image_that_the_processor_would_cut_otherwise_is_told(checkpoint: Path) -> None:
    adapter = open_model(str(checkpoint), size=LANDSCAPE)
    record = adapter.image_record(Processor(adapter))
    assert warnings(drawn_image(LANDSCAPE), record) == ()
    (square,) = warnings(drawn_image(Size(90, 90)), record)
    assert "70% of the tokens show black borders" in square
    assert square.endswith("for such images export with no --image-size")
    (tiny,) = warnings(drawn_image(Size(15, 51)), record)
    assert "51 x 15, is enlarged to the bundle's 203 x 60" in tiny
    for size in (Size(90, 90), Size(15, 51)):
        assert to_pixels(drawn_image(size), record).shape == adapter.pixels


def test_what_cannot_be_cut_is_refused(checkpoint: Path, tmp_path: Path, refused: Refused) -> None:
    said = refused("models", "--model", checkpoint, "--image-size", "50x50")
    assert "--image-size 50x50: pan and scan cuts images that are 1.2 times as long as" in said
    assert "one view of 48 x 48: leave it out" in said
    folder = gemma.gemma3().save(tmp_path)
    file = folder / "preprocessor_config.json"
    wrong: dict[str, tuple[Any, str]] = {
        "pan_and_scan_max_num_crops": (1, "is 1, supported is 2 crops or more"),
        "pan_and_scan_min_crop_size": ("a", "is 'a', supported is whole numbers of pixels"),
        "pan_and_scan_min_ratio_to_activate": (0.5, "is 0.5, supported is a ratio of 1 or more"),
        "size": ({"height": 40, "width": 40}, "supported is the encoder's 48 pixels a side"),
    }
    usual = json.loads(file.read_text())
    for name, (value, says) in wrong.items():
        file.write_text(json.dumps({**usual, name: value}))
        with pytest.raises(ModelError, match=says):
            found = open_model(str(folder), size=Size(600, 1280))
            found.image_record(Processor(found))


def test_settings_that_transformers_does_not_read_either_are_told(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "--model", str(checkpoint)]) == 0
    assert (
        "do_pan_and_scan of the image processor's settings is not read" in capsys.readouterr().out
    )
    assert main(["models", "--model", str(checkpoint), "--image-size", "203x60"]) == 0
    shown = capsys.readouterr().out
    assert "3 x 1 tiles of 48 and the whole" in shown and "not read" not in shown


def test_a_bundle_answers_as_transformers(tmp_path: Path) -> None:
    family = gemma.gemma3(num_hidden_layers=1)
    for name, value in {**SMALL, "do_pan_and_scan": True}.items():
        setattr(family.image_processor, name, value)
    model, image = family.save(tmp_path / "tiny"), drawn_image(PORTRAIT)
    bundle = frozen(tmp_path / "b", "none", model=model, size=PORTRAIT)
    adapter = open_model(str(model), size=PORTRAIT)
    wanted = generated(family, adapter, Processor(adapter)(image, QUESTION), **family.look(image))
    with Session.open(bundle) as session:
        manifest, tiling = session.engine.manifest, adapter.tiling
        assert tiling is not None and manifest.image.tiling == tiling
        assert list(session.ask(image, QUESTION, Sampling(max_new_tokens=32)).ids) == wanted

    for wrong, says in (
        (replace(tiling, crops=None), "tiles by crop with a rule of crops None"),
        (replace(tiling, kind="fit"), "tiles by fit with a rule of crops CropRule"),
        (replace(tiling, height=40), "2 x 1 crops are not those of its image size"),
    ):
        with pytest.raises(ValueError, match=says):
            check_sizes(replace(manifest, image=replace(manifest.image, tiling=wrong)))


@pytest.mark.slow
def test_a_pruned_bundle_answers_as_its_reference(checkpoint: Path, tmp_path: Path) -> None:
    """And a second turn, on the same caches."""
    adapter = open_model(str(checkpoint), size=LANDSCAPE)
    spec, layout = PruneSpec("utp", 4), adapter.vision_config.layout
    policy, fixed, count = make(spec), len(layout.fixed), layout.visual_tokens
    plan = plan_from_counts(count, (count - 8, fixed + 9, 3))
    made = exported(adapter, spec, plan, tmp_path / "b")
    session, reference = Session.open(made.path), Reference.build(adapter, policy, plan)
    image = drawn_image(LANDSCAPE)
    assert_same_answers(session, reference, adapter, image, QUESTION)
