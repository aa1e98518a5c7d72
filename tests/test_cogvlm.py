"""CogVLM and CogVLM2 beside a plain forward of the same weights, and the commands on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Refused

from edgeprune.cli import main
from edgeprune.demo import SAMPLES_DIR
from edgeprune.errors import SpecError
from edgeprune.models import open_model
from edgeprune.models._processor import Processor, Prompt
from edgeprune.models._reference import Reference
from edgeprune.policies import make
from edgeprune.spec import Plan, PruneSpec
from edgeprune.tiling import Size
from tests import cogvlm
from tests.cogvlm import Cog
from tests.test_families import drawn_image

SCENE = SAMPLES_DIR / "scene-1.png"
QUESTION = "what color is it?"


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Cog:
    return cogvlm.checkpoint(tmp_path_factory.mktemp("cogvlm") / "tiny")


def dense(cog: Cog) -> tuple[Reference, Prompt, Processor]:
    adapter = open_model(str(cog.folder), tokenizer=cog.tokenizer)
    assert adapter.all_notes == ()
    shape, processor = adapter.shape, Processor(adapter)
    plan = Plan(shape.visual_tokens, shape.layers)
    prompt = processor(drawn_image(Size(40, 31)), QUESTION)
    return Reference.build(adapter, make(PruneSpec("none")), plan), prompt, processor


@pytest.mark.parametrize("second", [False, True], ids=["cogvlm", "cogvlm2"])
def test_logits_are_those_of_a_plain_forward(
    second: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the prompt, and after each of four tokens of an answer."""
    cog = cogvlm.checkpoint(tmp_path / "tiny", second=second)
    if second:  # its placeholder is a reserved token of Llama 3's vocabulary, which is not here
        monkeypatch.setattr("edgeprune.models.cogvlm.RESERVED", 0)
    reference, prompt, processor = dense(cog)
    assert prompt.prefix_ids.tolist() == [[1, cogvlm.ROWS]]
    end, *text = prompt.text_ids[0].tolist()
    assert end == cogvlm.ROWS + 1
    assert processor.text(torch.tensor(text)) == f"Question: {QUESTION} Answer:"
    step = reference.prefill(prompt)
    for _ in range(5):
        wanted = cogvlm.logits(cog, prompt.pixels, text)
        torch.testing.assert_close(step.logits, wanted, rtol=0, atol=1e-4)
        text.append(int(wanted.argmax()))
        step = reference.step(torch.tensor([text[-1:]]))


def test_an_image_has_one_position_whatever_is_dropped(first: Cog) -> None:
    """So its tokens may go, and those of the text stay where they are."""
    adapter = open_model(str(first.folder), tokenizer=first.tokenizer)
    shape = adapter.shape
    assert (shape.visual_tokens, shape.one_position) == (16, True)
    for method in ("none", "divprune", "fastv"):
        policy = make(PruneSpec(method, 1 if method == "none" else 1.4))
        decoder = adapter.decoder(policy, policy.plan(shape, 1 if method == "none" else 1.4))
        assert decoder.span == 1 and not decoder.places_tokens
    with pytest.raises(SpecError, match="this model has one an image; leave it out"):
        make(PruneSpec("divprune", 2, options={"positions": "renumber"})).plan(shape, 2)


def test_the_commands_export_and_ask(
    first: Cog, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """UTP with weights of 4 bits, whose position-agnostic part finds one position; parity is
    checked on the way, decode steps without an image too."""
    source = ["--model", str(first.folder), "--tokenizer", str(first.tokenizer)]
    question = {"from": "human", "value": f"<image>{QUESTION}"}
    record = {"id": "1", "image": SCENE.name, "conversations": [question]}
    (tmp_path / "samples.json").write_text(json.dumps([record]))
    samples = ["--samples-file", str(tmp_path / "samples.json"), "--image-dir", str(SCENE.parent)]
    options = ["--method", "utp", "--cr", "2", "--weights", "int4:block=32", *samples]
    made = ["--samples", "1", "--parity", "1", "-o", str(tmp_path / "bundle")]
    assert main(["export", *source, *options, *made]) == 0
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["parity"]["samples"] == 1 and manifest["parity"]["ties"] == 0
    assert manifest["decoder"]["image_positions"] == 1
    assert "int4" in manifest["weights"]["tensors"]
    asked = ["--image", str(SCENE), "--prompt", QUESTION, "--prompt", "what?", "--json"]
    assert main(["run", str(tmp_path / "bundle"), *asked, "--max-new-tokens", "3"]) == 0
    turns = json.loads(capfd.readouterr().out.splitlines()[-1])["turns"]
    assert [len(turn["ids"]) for turn in turns] == [3, 3]


def test_a_missing_or_foreign_tokenizer_is_told(
    first: Cog, tmp_path: Path, refused: Refused
) -> None:
    said = refused("models", "--model", first.folder)
    assert "neither tokenizer.json nor tokenizer.model; name a folder that has one with" in said
    said = refused("models", "--model", first.folder, "--tokenizer", tmp_path / "none")
    assert "--tokenizer is a folder with a tokenizer;" in said
    cogvlm.sentencepiece(tmp_path / "tokenizer.model", cogvlm.PIECES[:-2])
    said = refused("models", "--model", first.folder, "--tokenizer", tmp_path)
    assert f"tokens, the model {cogvlm.ROWS}: it is another's" in said


def test_a_config_without_a_field_is_told(tmp_path: Path, refused: Refused) -> None:
    cog = cogvlm.checkpoint(tmp_path / "a")
    config = json.loads((cog.folder / "config.json").read_text())
    del config["rms_norm_eps"]
    (cog.folder / "config.json").write_text(json.dumps(config))
    said = refused("models", "--model", cog.folder, "--tokenizer", cog.tokenizer)
    assert "config.json is damaged: it has no 'rms_norm_eps'" in said
