"""Ministral 3, Mistral Small 3.1 and Pixtral 12B against transformers: pixels, answers, layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Refused
from safetensors.torch import load_file, save_file

from edgeprune.errors import ModelError
from edgeprune.models import Adapter, _pixtral, open_model
from edgeprune.models._layout import Layout
from edgeprune.models._processor import Processor, Prompt
from edgeprune.models._reference import Reference
from edgeprune.policies import make
from edgeprune.runtime import Session, media
from edgeprune.spec import PruneSpec, plan_from_counts
from edgeprune.tiling import Size
from tests import pixtral
from tests.dense import MORE, assert_same_logits, dense
from tests.dialogues import assert_same_answers, exported
from tests.engines import GPUS, assert_accepted
from tests.essence import essence
from tests.families import QUESTION, Family
from tests.frozen import frozen
from tests.test_families import block, drawn_image, generated

KINDS: dict[str, Callable[..., Family]] = {
    "ministral3": pixtral.ministral3,
    "mistral_small": pixtral.mistral_small,
    "pixtral": pixtral.pixtral,
}
SHOWN = {Size(84, 84): Size(83, 84), Size(112, 140): Size(221, 279), Size(140, 56): Size(281, 104)}
"""Images of the second size become images of the first."""


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def family(kind: str) -> Family:
    return KINDS[kind]()


@pytest.fixture(scope="module")
def checkpoint(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family.save(tmp_path_factory.mktemp(family.name) / "tiny")


def logits(family: Family, adapter: Adapter, prompt: Prompt, seen: Any) -> torch.Tensor:
    """Of transformers' model, for every token of a prompt and of MORE: [S, vocabulary]."""
    parts = prompt.prefix_ids, torch.tensor([block(adapter)]), prompt.text_ids, MORE
    with torch.no_grad():
        found: torch.Tensor = family.model(input_ids=torch.cat(parts, dim=1), **seen).logits[0]
    return found


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("size", essence(SHOWN, [str(Size(112, 140))]))
def test_the_dense_model_is_that_of_transformers(
    family: Family, checkpoint: Path, size: Size, images: int
) -> None:
    """Pixels, answers of 64 tokens, and logits over two turns."""
    adapter = open_model(str(checkpoint), size=size, images=images)
    shown = [drawn_image(SHOWN[size], seed) for seed in range(images)]
    seen = family.look(shown)
    record = replace(adapter.image_record(Processor(adapter)), images=images)
    prepared = media.prepare(shown, record)
    assert prepared.warnings == ()
    np.testing.assert_array_equal(prepared.pixels, seen["pixel_values"].numpy())
    prompt, ours = Processor(adapter)(shown, QUESTION), dense(adapter)
    assert torch.equal(prompt.pixels, seen["pixel_values"])
    wanted = generated(family, adapter, prompt, tokens=64, **seen)
    assert ours.generate(prompt, 64, lambda token: False) == wanted
    theirs = logits(family, adapter, prompt, seen)
    assert_same_logits(ours, prompt, theirs)


def test_the_prompt_is_that_of_the_processor(checkpoint: Path, family: Family) -> None:
    """A mark behind each row but the last, which ends the image; PixtralProcessor itself asks for
    torchvision."""
    adapter = open_model(str(checkpoint), size=Size(84, 112), images=2)
    assert isinstance(adapter, _pixtral.Adapter)
    rows, columns = (n // adapter.step for n in (84, 112))
    row = "<image>" * columns
    written = "[IMG_BREAK]".join([row] * rows) + "[IMG_END]"
    tokenizer = adapter.chat.tokenizer
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": QUESTION}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
    ).replace("<image>", written)
    prefix, _, later = adapter.chat.split(adapter.media, QUESTION)
    ids = torch.cat([prefix, torch.tensor([block(adapter)]), later], dim=1)
    assert ids[0].tolist() == tokenizer(text)["input_ids"]
    assert adapter.shape.visual_tokens == 2 * rows * columns + 2 * rows - 1


def test_text_stands_between_parts_of_equal_size() -> None:
    layout = Layout.plain(4, 2, 2, across=6).parted([[7], [8, 9], [7]])
    assert layout.order == (0, 1, 2, -1, 3, 4, 5, -2, -3, 6, 7, 8, -4, 9, 10, 11)
    assert layout.ids(5) == (5, 5, 5, 7, 5, 5, 5, 8, 9, 5, 5, 5, 7, 5, 5, 5)
    assert (layout.text, layout.grid) == ((7, 8, 9, 7), (1, 16))


def test_a_dialogue_ends_before_queries_are_scaled(tmp_path: Path) -> None:
    """Behind 512 positions transformers scales the queries of Ministral 3."""
    adapter = open_model(str(pixtral.ministral3().save(tmp_path)))
    assert adapter.shape.max_positions == 512
    text = pixtral.ministral3().model.config.text_config
    assert text.max_position_embeddings == 1024


@pytest.mark.slow
def test_a_pruned_bundle_answers_as_its_reference(checkpoint: Path, tmp_path: Path) -> None:
    """And a second turn, on the same caches; marks between rows stay."""
    adapter, spec = open_model(str(checkpoint), size=Size(112, 140)), PruneSpec("utp", 4)
    policy, layout = make(spec), adapter.vision_config.layout
    fixed, count = len(layout.fixed), layout.visual_tokens
    plan = plan_from_counts(count, (count - 6, fixed + 5, 3))
    made = exported(adapter, spec, plan, tmp_path / "b")
    session, reference = Session.open(made.path), Reference.build(adapter, policy, plan)
    image = drawn_image(Size(221, 279))
    answer = assert_same_answers(session, reference, adapter, image, QUESTION)
    assert set(layout.fixed) <= set(answer.vision_kept.tolist())


def test_both_published_layouts_are_the_same(
    family: Family, checkpoint: Path, tmp_path: Path
) -> None:
    """The modules' own names of tensors beside the older ones that are saved; the old names of
    rotary settings; the template in chat_template.json."""
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    saved = load_file(checkpoint / "model.safetensors")
    own = family.model.state_dict()
    assert any(name not in saved for name in own)
    save_file(own, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    vision, text = config["vision_config"], config["text_config"]
    vision["rope_theta"] = vision.pop("rope_parameters")["rope_theta"]
    if text["model_type"] == "mistral":
        text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    template = (tmp_path / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    ours, again = (open_model(str(path), size=Size(84, 84)) for path in (checkpoint, tmp_path))
    assert again.decoder_config == ours.decoder_config
    assert again.vision_config == ours.vision_config
    assert again.all_notes == ours.all_notes == ()
    prompt = Processor(again)(drawn_image(Size(84, 84)), QUESTION)
    assert torch.equal(dense(again).prefill(prompt).logits, dense(ours).prefill(prompt).logits)


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "layer": (lambda c: c.update(vision_feature_layer=-2), "vision_feature_layer -2"),
    "layers": (lambda c: c.update(vision_feature_layer=[-2, -1]), r"vision_feature_layer \[-2, -1"),
    "tower": (
        lambda c: c.update(vision_config={"model_type": "siglip_vision_model"}),
        "a siglip_vision_model vision tower",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_config_asks_beyond_is_refused_by_name(name: str, tmp_path: Path) -> None:
    folder, (change, says) = pixtral.ministral3().save(tmp_path), REFUSED[name]
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"mistral3 checkpoint has .*{says}.*: not supported"):
        open_model(str(folder))


def test_sizes_that_cannot_be_frozen_are_refused(tmp_path: Path, refused: Refused) -> None:
    folder = pixtral.ministral3().save(tmp_path)
    said = refused("models", "--model", folder, "--image-size", "100x84")
    assert "multiples of 28; the nearest such size is 112x84" in said
    said = refused("models", "--model", folder, "--image-size", "168x84")
    assert "--image-size 168x84: the checkpoint's image processor makes 140x140 at most" in said


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("method", ["none", "utp"])
@pytest.mark.parametrize("target", GPUS)
def test_engines_take_it(kind: str, target: str, method: str, dtype: str, tmp_path: Path) -> None:
    """`check` accepts the bundle, and TensorRT-RTX compiles that for RTX cards."""
    long = {"original": 1024} if kind == "ministral3" else {"max_position_embeddings": 1024}
    model, cr = KINDS[kind](num_hidden_layers=5, **long).save(tmp_path / "deep"), 4
    options: dict[str, Any] = {"model": model, "target": target, "dtype": dtype}
    made = tmp_path / "b", method, cr if method == "utp" else 1
    bundle = frozen(*made, **options, size=Size(140, 140))
    assert_accepted(bundle, target)
