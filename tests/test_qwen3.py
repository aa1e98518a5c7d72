"""Qwen3-VL against transformers' own model: positions, DeepStack rows, answers, layouts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Refused
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForImageTextToText, GenerationConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from edgeprune.calib.collect import collect
from edgeprune.calib.samples import Sample
from edgeprune.commands._common import image_size
from edgeprune.errors import ModelError
from edgeprune.export.exporter import ExportRequest, export
from edgeprune.models import open_model
from edgeprune.models._mrope import interleaved
from edgeprune.models._position_grid import PositionGrid
from edgeprune.models._processor import Processor, Prompt, random_prompt
from edgeprune.models._reference import Reference
from edgeprune.policies import make
from edgeprune.runtime import Sampling, Session
from edgeprune.spec import Plan, PruneSpec, plan_from_counts
from edgeprune.tiling import Size
from tests.dense import dense
from tests.dialogues import assert_same_answers
from tests.qwen import (
    QUESTION,
    STACKED_IMAGES,
    assert_same_dialogue,
    drawn_image,
    generated,
    inputs,
    pruned_logits,
    stacked_checkpoint,
)
from tests.whole_model import advances

SIZE = Size(256, 256)  # 64 tokens


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stacked_checkpoint(tmp_path_factory.mktemp("qwen3_vl"))


@pytest.fixture(scope="module")
def theirs(checkpoint: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()


@pytest.mark.parametrize("sections", [(24, 20, 20), (11, 11, 10), (6, 5, 5), (4, 2, 2)])
def test_axes_take_turns_as_in_transformers(sections: tuple[int, int, int]) -> None:
    frequencies = torch.arange(3.0)[:, None, None].expand(3, 1, sum(sections)).clone()
    own = SimpleNamespace(mrope_section=sections)
    found = Qwen3VLTextRotaryEmbedding.recomposition_frequencies(own, frequencies)
    assert list(interleaved(sections)) == found[0, : sum(sections)].int().tolist()


@given(st.integers(1, 9), st.integers(1, 9), st.integers(2, 8))
def test_positions_are_resampled_as_in_transformers(rows: int, columns: int, side: int) -> None:
    rows, columns = 2 * rows, 2 * columns
    config = SimpleNamespace(rows=rows, columns=columns, position_side=side, width=3, cubic=False)
    grid = PositionGrid(config)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(side)
    grid.weight.data = torch.randn(side**2, 3, generator=generator)
    found = grid(torch.zeros(2, rows * columns, 3))
    indices, shares = get_vision_interpolation_indices_and_weights(
        torch.tensor([[1, rows, columns]]), side, align_corners=True
    )
    wanted = (grid.weight[indices] * shares[..., None]).sum(1)
    torch.testing.assert_close(found[1], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", STACKED_IMAGES)
def test_the_dense_model_is_that_of_transformers(size: str, checkpoint: Path, theirs: Any) -> None:
    """Greedy answers and logits over two turns, at three aspect ratios."""
    adapter = open_model(str(checkpoint), size=image_size(size))
    assert_same_dialogue(adapter, [drawn_image(*STACKED_IMAGES[size])], theirs)


def test_two_images_with_text_between_are_those_of_transformers(
    checkpoint: Path, theirs: Any
) -> None:
    """Text between images gets no DeepStack rows."""
    adapter = open_model(str(checkpoint), size=SIZE, images=2)
    images = [drawn_image(250, 262, seed) for seed in range(2)]
    prompt = Processor(adapter)(images, QUESTION)
    ours, seen = dense(adapter), inputs(adapter, images, prompt.pixels)
    with torch.no_grad():
        wanted = theirs(**seen).logits[0, -1]
    torch.testing.assert_close(ours.prefill(prompt).logits, wanted, atol=1e-5, rtol=1e-5)
    answer = generated(adapter, images, prompt.pixels)
    assert ours.generate(prompt, 32, lambda token: False) == answer


def test_rows_go_where_their_tokens_go(checkpoint: Path, theirs: Any) -> None:
    """Tokens are dropped in the vision graph and before layers 2, 3 and 4, which rows enter."""
    adapter = open_model(str(checkpoint), size=SIZE)
    plan, image = plan_from_counts(64, (40, 24, 13, 7)), drawn_image(250, 262)
    prompt = Processor(adapter)(image, QUESTION)
    ours = Reference.build(adapter, make(PruneSpec("utp", 3)), plan)
    step = ours.prefill(prompt)
    layers = [stage.layer for stage in plan.in_decoder]
    assert layers == [2, 3, 4]
    kept = dict(zip(layers, step.kept, strict=True))
    with torch.no_grad():
        given = inputs(adapter, [image], prompt.pixels)
        wanted = pruned_logits(theirs, given, ours.vision_kept, kept)
    torch.testing.assert_close(step.logits, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["visionzip", "prumerge"])
def test_rows_of_merged_tokens_are_averaged_as_the_tokens_are(
    method: str, checkpoint: Path
) -> None:
    """Were the middle blocks' features the last block's, the rows would be merged as those are."""
    adapter = open_model(str(checkpoint), size=SIZE)
    policy = make(PruneSpec(method, 4))
    plan = policy.plan(adapter.shape, 4)
    vision: Any = Reference.build(adapter, policy, plan).vision
    seen = vision.encoder(Processor(adapter)(drawn_image(250, 262), QUESTION).pixels)
    signals = vision.signals(seen)
    alike = replace(signals, middle=(signals.features,) * 3)
    (stage,) = plan.before_decoder()
    assert stage.merged
    merged = policy.vision(signals, stage).gather(signals.features)
    vision.signals = lambda seen: alike
    with torch.no_grad():
        visual, _ = vision.select(seen)
    rows = visual.chunk(4, dim=-1)[1:]
    for part, row in zip(vision.deepstack, rows, strict=True):
        torch.testing.assert_close(row, part(merged))


def exported(
    checkpoint: Path, spec: PruneSpec, plan: Plan, folder: Path
) -> tuple[Session, Reference, Prompt]:
    """A bundle, compared with its eager reference on the way, opened; and that reference."""
    adapter, policy = open_model(str(checkpoint), size=SIZE), make(spec)
    prompts = [random_prompt(adapter.pixels, 256, seed) for seed in range(2)]
    request = ExportRequest("qwen3", spec, plan, folder / spec.method)
    made = export(request, adapter, policy, Processor(adapter), prompts)
    assert (made.manifest.parity.samples, made.manifest.parity.ties) == (2, 0)
    prompt = Processor(adapter)(drawn_image(250, 262), QUESTION)
    return Session.open(made.path), Reference.build(adapter, policy, plan), prompt


@pytest.mark.slow
def test_a_dense_bundle_answers_as_transformers(checkpoint: Path, tmp_path: Path) -> None:
    session, _, prompt = exported(checkpoint, PruneSpec("none"), Plan(64, 4), tmp_path)
    assert session.manifest.decoder.deepstack == 3
    image, adapter = drawn_image(250, 262), open_model(str(checkpoint), size=SIZE)
    answer = session.ask(image, QUESTION, Sampling(max_new_tokens=64))
    wanted = generated(adapter, [image], prompt.pixels, GenerationConfig(max_new_tokens=64))
    ends = [n for n, token in enumerate(wanted, 1) if token in session.manifest.text.eos_token_ids]
    assert list(answer.ids) == wanted[: ends[0] if ends else 64]
    assert answer.warnings == ()


def test_a_pruned_bundle_answers_as_its_reference(checkpoint: Path, tmp_path: Path) -> None:
    """And a second turn, on the same caches."""
    plan = plan_from_counts(64, (36, 16, 8, 4))
    session, reference, _ = exported(checkpoint, PruneSpec("utp", 4), plan, tmp_path)
    adapter = open_model(str(checkpoint), size=SIZE)
    assert_same_answers(session, reference, adapter, drawn_image(250, 262), QUESTION)


def test_a_checkpoint_of_transformers_5_is_the_same(
    checkpoint: Path, theirs: Any, tmp_path: Path
) -> None:
    """Saved anew, names and config are those of transformers 5; the template is a file."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "saved"))
    for old in (*folder.glob("*.safetensors*"), folder / "chat_template.json"):
        old.unlink()
    theirs.save_pretrained(folder)
    template = json.loads((checkpoint / "chat_template.json").read_text())["chat_template"]
    (folder / "chat_template.jinja").write_text(template)
    assert "rope_parameters" in json.loads((folder / "config.json").read_text())["text_config"]
    ours, again = (open_model(str(path), size=SIZE) for path in (checkpoint, folder))
    assert again.decoder_config == ours.decoder_config
    assert again.vision_config == ours.vision_config
    assert again.all_notes == ours.all_notes == ()
    prompt = Processor(again)(drawn_image(250, 262), QUESTION)
    assert torch.equal(dense(again).prefill(prompt).logits, dense(ours).prefill(prompt).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_position_embeddings": 50}, "a grid of 50 positions"),
        ({"deepstack_visual_indexes": [0, 9]}, r"deepstack_visual_indexes \[0, 9\] of 4 blocks"),
        ({"deepstack_visual_indexes": [1, 0]}, r"deepstack_visual_indexes \[1, 0\] of 4 blocks"),
        ({"out_hidden_size": 32}, "out_hidden_size 32 for a decoder of 64"),
    ],
)
def test_what_is_not_supported_is_named(
    change: dict[str, Any], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "changed"))
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        open_model(str(folder))


def test_sizes_that_cannot_be_frozen_are_refused(checkpoint: Path, refused: Refused) -> None:
    said = refused("models", "--model", checkpoint, "--image-size", "448x450")
    assert "multiples of 32; the nearest such size is 448x448" in said


def test_calibration_sees_what_each_layer_loses(checkpoint: Path) -> None:
    """The loss of layers from l on without visual tokens, whose rows are then not added either."""
    adapter = open_model(str(checkpoint), size=SIZE)
    prompt = Processor(adapter)(drawn_image(250, 262), QUESTION)
    evidence = collect(adapter, make(PruneSpec("utp", 4)), [Sample("one", prompt)])
    features = list[Tensor]()
    for last in range(1, 5):  # that sees visual tokens
        plan = plan_from_counts(64, (64,) * last + (0,) * (4 - last))
        reference = Reference.build(adapter, make(PruneSpec("none")), plan)
        hidden = advances(reference, prompt)[-1].flow.hidden
        features.append(reference.decoder.norm(hidden[0, -1]))
    for layer, feature in enumerate(features[:3], start=2):
        angle = torch.cosine_similarity(feature, features[3], dim=0).clamp(-1, 1).acos()
        assert evidence.loss[0, layer - 1] == pytest.approx(float(angle), abs=2e-3)
