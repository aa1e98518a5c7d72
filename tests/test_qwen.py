"""Qwen2-VL and Qwen2.5-VL against transformers' own models: pixels, positions, answers, methods."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Refused
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForImageTextToText
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

from edgeprune.commands._common import image_size
from edgeprune.errors import InputError, ModelError
from edgeprune.export.exporter import ExportRequest, export
from edgeprune.models import Adapter, _qwen, open_model
from edgeprune.models._mrope import Grid, MRope, in_runs
from edgeprune.models._processor import Processor, Prompt, random_prompt
from edgeprune.models._reference import Reference
from edgeprune.policies import make, names
from edgeprune.policies._signals import Segments
from edgeprune.runtime import Sampling, Session
from edgeprune.runtime.images import to_pixels, warnings
from edgeprune.spec import Plan, PruneSpec, plan_from_counts
from edgeprune.tiling import Size, rounds_to
from tests.dense import MORE, assert_same_logits
from tests.families import with_settings
from tests.qwen import IMAGES, QUESTION, drawn_image, plain_checkpoint, windowed_checkpoint


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_checkpoint(tmp_path_factory.mktemp("qwen2_vl"))


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return windowed_checkpoint(tmp_path_factory.mktemp("qwen2_5_vl"))


@pytest.fixture(scope="module", params=["plain", "windowed"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def theirs(checkpoint: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()


def inputs(adapter: Adapter, prompt: Prompt, image: Image.Image) -> dict[str, Any]:
    """What transformers' processor would make of an image and a prompt."""
    encoded = Processor(adapter).image_processor(images=image, return_tensors="pt")
    token = adapter.image_token_id
    seen = torch.full((1, int(encoded["image_grid_thw"].prod()) // 4), token)
    ids = torch.cat([prompt.prefix_ids, seen, prompt.text_ids], 1)
    kinds = (ids == token).int()
    return {**encoded, "input_ids": ids, "mm_token_type_ids": kinds}


def their_answer(
    model: Any, adapter: Adapter, prompt: Prompt, image: Image.Image, **options: Any
) -> list[int]:
    """32 greedy tokens, unless by the options."""
    given = inputs(adapter, prompt, image)
    ids = model.generate(
        **given,
        attention_mask=torch.ones_like(given["input_ids"]),
        **(options or {"max_new_tokens": 32, "eos_token_id": None}),
        do_sample=False,
        pad_token_id=0,
    )
    return ids[0, given["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("size", IMAGES)
def test_the_dense_model_is_that_of_transformers(size: str, checkpoint: Path, theirs: Any) -> None:
    """Greedy answers and logits over two turns; three shapes, with whole windows and cut ones."""
    adapter = open_model(str(checkpoint), size=image_size(size))
    image = drawn_image(*IMAGES[size])
    prompt = Processor(adapter)(image, QUESTION)
    ours = Reference.build(adapter, make(PruneSpec("none")), Plan(adapter.shape.visual_tokens, 2))
    wanted = their_answer(theirs, adapter, prompt, image)
    assert ours.generate(prompt, 32, lambda token: False) == wanted
    longer = replace(prompt, text_ids=torch.cat([prompt.text_ids, MORE], 1))
    with torch.no_grad():
        logits = theirs(**inputs(adapter, longer, image)).logits[0]
    assert_same_logits(ours, prompt, logits)


@pytest.mark.parametrize("size", IMAGES)
def test_pixels_are_those_of_the_processor(size: str, plain: Path) -> None:
    adapter, image = open_model(str(plain), size=image_size(size)), drawn_image(*IMAGES[size])
    processor = Processor(adapter)
    record = adapter.image_record(processor)
    assert isinstance(adapter, _qwen.Adapter)
    wanted = adapter._raster(processor.image_processor(image, return_tensors="pt")["pixel_values"])
    assert wanted.shape == adapter.pixels == record.shape
    np.testing.assert_array_equal(to_pixels(image, record), wanted)
    assert torch.equal(processor(image, QUESTION).pixels, wanted)
    assert warnings(image, record) == ()


@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(4, 4096))
def test_what_the_processor_makes_of_a_image_fits(width: int, height: int, tokens: int) -> None:
    assume(max(width, height) <= 199 * min(width, height))
    budget = {"min_pixels": 3136, "max_pixels": 28 * 28 * tokens}
    made = Size(*smart_resize(height, width, **budget))
    assert rounds_to(Size(height, width), made, 28) or min(made) == 28  # never less than 28
    assert rounds_to(Size(2 * made.height, 2 * made.width), made, 28)


def test_another_shape_is_fitted_with_black_bars_and_said(plain: Path) -> None:
    adapter = open_model(str(plain), size=Size(112, 224))
    processor = Processor(adapter)
    record = adapter.image_record(processor)
    image = drawn_image(224, 224)
    pixels = to_pixels(image, record)
    assert torch.equal(processor(image, QUESTION).pixels, torch.from_numpy(pixels))
    black = (0 - np.array(record.mean, np.float32)) / np.array(record.std, np.float32)
    for bar in (pixels[0, :, :, :56], pixels[0, :, :, 168:]):
        np.testing.assert_allclose(bar, np.broadcast_to(black[:, None, None], bar.shape), rtol=1e-6)
    (said,) = warnings(image, record)
    assert "50% of the tokens show black borders" in said
    assert said.endswith("export with --image-size 168x168")
    with pytest.raises(InputError, match=r"too long and narrow.*--image-size 28x868"):
        warnings(drawn_image(10, 300), record)


@pytest.mark.parametrize("text", ["448x450", "20x448", "448", "0x28", "28x28"])
def test_sizes_that_cannot_be_frozen_are_refused(text: str, plain: Path, refused: Refused) -> None:
    said = refused("export", "--model", plain, "--method", "none", "--image-size", text)
    wanted = {
        "448x450": "sides of a qwen2_vl are multiples of 28; the nearest such size is 448x448",
        "20x448": "the nearest such size is 28x448",
        "28x28": "--image-size 28x28 is 784 pixels, the checkpoint's image processor makes 3,136",
    }
    assert wanted.get(text, "WIDTHxHEIGHT in pixels") in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]}}, r"section \[2, 2, 2\]"),
        ({"use_sliding_window": True, "max_window_layers": 1}, "sliding windows in the decoder"),
        ({"vision_config": {"hidden_act": "relu"}}, "activation 'relu'"),
        ({"vision_config": {"fullatt_block_indexes": [2]}}, r"attention in blocks \[2\] of 2"),
    ],
)
def test_what_is_not_supported_is_named(
    change: dict[str, Any], message: str, windowed: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(windowed, tmp_path / "changed"))
    config = json.loads((folder / "config.json").read_text())
    change["vision_config"] = {**config["vision_config"], **change.get("vision_config", {})}
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelError, match=message):
        open_model(str(folder))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 5), st.integers(1, 5), st.data())
def test_positions_are_those_of_transformers(
    rows: int, columns: int, before: int, after: int, data: st.DataObject
) -> None:
    """Three a token, from a first token of 0; tokens that were pruned leave gaps."""
    patches = range(rows * columns)
    kept = sorted(data.draw(st.sets(st.sampled_from(patches), min_size=1)))
    kinds = torch.tensor([[0] * before + [1] * len(patches) + [0] * after])
    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))
    model = SimpleNamespace(config=config)
    model.get_vision_position_ids = partial(Qwen2VLModel.get_vision_position_ids, model)
    wanted, delta = Qwen2VLModel.get_rope_index(
        model, kinds, kinds, torch.tensor([[1, 2 * rows, 2 * columns]])
    )
    mrope, segments = (
        MRope.of(in_runs((2, 3, 3)), Grid(rows, columns)),
        Segments(before, len(kept), after),
    )
    found = mrope.positions(torch.tensor([0]), segments, torch.tensor(kept))
    alive = [*range(before), *(before + k for k in kept)]
    alive += range(before + len(patches), kinds.shape[1])
    assert found[:, : segments.total].tolist() == wanted[:, 0, alive].tolist()
    assert before + mrope.span + after == kinds.shape[1] + int(delta)
    later = mrope.positions(torch.tensor([40]), Segments(0, 0, 2), torch.tensor([], dtype=int))
    assert later[:, :2].tolist() == [[40, 41]] * 3
    assert later.max() == 41, "a step at the last position reads no row beyond the tables"


def exported(
    checkpoint: Path, spec: PruneSpec, folder: Path, counts: tuple[int, ...] | None = None
) -> tuple[Path, Reference, Adapter]:
    """A bundle for images of 196 x 140, by a made-up schedule if any, and its reference."""
    adapter, policy = open_model(str(checkpoint), size=Size(140, 196)), make(spec)
    plan = plan_from_counts(35, counts) if counts else policy.plan(adapter.shape, spec.cr)
    prompts = [random_prompt(adapter.pixels, 256, seed) for seed in range(2)]
    request = ExportRequest(checkpoint.name, spec, plan, folder / spec.method)
    made = export(request, adapter, policy, Processor(adapter), prompts)
    assert (made.manifest.parity.samples, made.manifest.parity.ties) == (2, 0)
    return made.path, Reference.build(adapter, policy, plan), adapter


def agree(bundle: Path, reference: Reference, adapter: Adapter) -> Session:
    """The runtime's greedy answer and follow-up are the eager reference's; the session."""
    session, image = Session.open(bundle), drawn_image(*IMAGES["196x140"])
    answer = session.ask(image, QUESTION, Sampling(max_new_tokens=5))
    ends = session.manifest.text.eos_token_ids
    prompt = Processor(adapter)(image, QUESTION)
    assert list(answer.ids) == reference.generate(prompt, 5, lambda token: token in ends)
    step = reference.step(torch.from_numpy(session.engine.prompter.next_turn("how many ?")))
    again = session.follow_up("how many ?", Sampling(max_new_tokens=1))
    assert again.ids == (int(step.logits.argmax()),)
    return session


def test_a_bundle_answers_as_transformers(checkpoint: Path, theirs: Any, tmp_path: Path) -> None:
    """From an image to 64 tokens: pixels, prompt, positions, graphs, settings of generation."""
    checkpoint = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    settings = with_settings(checkpoint)
    bundle, reference, adapter = exported(checkpoint, PruneSpec("none"), tmp_path)
    session, image = agree(bundle, reference, adapter), drawn_image(*IMAGES["196x140"])
    prompt = Processor(adapter)(image, QUESTION)
    answer = session.ask(image, QUESTION, Sampling(max_new_tokens=32))
    wanted = their_answer(theirs, adapter, prompt, image)
    assert session.manifest.text.eos_token_ids[0] not in wanted
    assert list(answer.ids) == wanted
    options = {"generation_config": settings, "max_new_tokens": 64}
    own = their_answer(theirs, adapter, prompt, image, **options)
    answer = session.ask(image, QUESTION, replace(session.sampling, max_new_tokens=64))
    assert list(answer.ids) == own and len(own) >= 40
    assert own[:32] != wanted


def test_pruning_in_both_graphs_agrees_with_the_reference(tmp_path: Path) -> None:
    """UTP drops tokens before the decoder by received attention, and between its layers."""
    checkpoint, counts = windowed_checkpoint(tmp_path / "deeper", layers=4), (17, 5, 2, 1)
    session = agree(*exported(checkpoint, PruneSpec("utp", 5.6), tmp_path, counts))
    answer, manifest = session.answer, session.manifest
    assert answer is not None and manifest.prune.counts == counts
    assert (len(answer.vision_kept), *map(len, answer.layer_kept)) == counts
    assert (manifest.prune.grid, manifest.decoder.image_positions) == ((5, 7), 7)


def test_pruning_by_the_text_agrees_with_the_reference(windowed: Path, tmp_path: Path) -> None:
    """TrimTokenator drops tokens in the decoder's graph, before its first layer."""
    agree(*exported(windowed, PruneSpec("trimtokenator", 4), tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted({*names()} - {"none", "vtw", "tome"}))
@pytest.mark.parametrize("family", [plain_checkpoint, windowed_checkpoint])
def test_every_method_agrees_with_its_reference(family: Any, method: str, tmp_path: Path) -> None:
    checkpoint = family(tmp_path / "checkpoint", layers=8)
    counts = {"utp": (35, 15, 8, 5, 3, 2, 1, 1)}.get(method)
    options = {"K": "1"} if method in ("fastv", "dart") else {}
    session = agree(*exported(checkpoint, PruneSpec(method, 4, 0, options), tmp_path, counts))
    assert session.manifest.prune.cr_reached == pytest.approx(4, rel=0.1)


def test_merging_inside_the_encoder_is_refused(plain: Path, refused: Refused) -> None:
    said = refused("export", "--model", plain, "--method", "tome")
    assert "reads several patches as one token" in said
