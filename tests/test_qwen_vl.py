"""The first Qwen-VL beside a plain forward of the same weights, and the commands on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Refused

from edgeprune.cli import main
from edgeprune.demo import SAMPLES_DIR
from edgeprune.models import open_model
from edgeprune.models._processor import Processor
from edgeprune.models._reference import Reference
from edgeprune.models._resampled import bicubic
from edgeprune.models._tokenizer import read_tokenizer
from edgeprune.policies import make
from edgeprune.spec import Plan, PruneSpec
from edgeprune.tiling import Size
from tests import qwen_vl
from tests.qwen_vl import RANKS, QwenVL
from tests.test_families import drawn_image

SCENE = SAMPLES_DIR / "scene-1.png"
QUESTION = "what color is it?"
START, END, PAD = RANKS + 214, RANKS + 215, RANKS + 216


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> QwenVL:
    return qwen_vl.checkpoint(tmp_path_factory.mktemp("qwen_vl") / "tiny")


def dense(model: QwenVL, images: int) -> tuple[Reference, Processor]:
    adapter = open_model(str(model.folder), images=images)
    assert adapter.all_notes == ()
    plan = Plan(adapter.shape.visual_tokens, adapter.shape.layers)
    return Reference.build(adapter, make(PruneSpec("none")), plan), Processor(adapter)


@pytest.mark.parametrize("images", [1, 2])
def test_logits_are_those_of_a_plain_forward(chat: QwenVL, images: int) -> None:
    """Of the prompt, and after each of three tokens of an answer."""
    reference, processor = dense(chat, images)
    prompt = processor([drawn_image(Size(40, 31), seed) for seed in range(images)], QUESTION)
    assert int(prompt.prefix_ids[0, -1]) == START and int(prompt.text_ids[0, 0]) == END
    shown = [qwen_vl.tokens(chat, image[None])[0] for image in prompt.pixels]
    table, visual = chat.tensors["transformer.wte.weight"], shown[0]
    for image in shown[1:]:
        between = processor.adapter.between[0]
        visual = torch.cat([visual, table[between], image])
        text = processor.text(torch.tensor(between[1:-1]))
        assert (between[0], text, between[-1]) == (END, "\nPicture 2: ", START)
    prefix, ids = prompt.prefix_ids[0].tolist(), prompt.text_ids[0].tolist()
    step = reference.prefill(prompt)
    torch.testing.assert_close(reference.visual[0], visual, rtol=0, atol=1e-4)
    for _ in range(4):
        wanted = qwen_vl.logits(chat, prefix, visual, ids)
        torch.testing.assert_close(step.logits, wanted, rtol=0, atol=1e-4)
        ids.append(int(wanted.argmax()))
        step = reference.step(torch.tensor([ids[-1:]]))


def test_scores_before_the_decoder_are_the_cross_attentions(chat: QwenVL) -> None:
    """A patch has what all queries give it, a token the mean of that over what it looks at."""
    reference, processor = dense(chat, 1)
    pixels = processor(drawn_image(Size(40, 31)), QUESTION).pixels
    attention = qwen_vl.tokens(chat, pixels)[1]
    seen = reference.vision.encoder(pixels)  # type: ignore[operator]
    signals = reference.vision.signals(seen)  # type: ignore[operator]
    wanted = attention @ attention.mean(0)
    torch.testing.assert_close(signals.salience(), wanted, rtol=0, atol=1e-6)
    assert torch.equal(signals.received_attention(from_others=True), signals.salience())
    keys = attention @ seen.key[0].mean(0)
    torch.testing.assert_close(signals.keys(), keys, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("side", "wanted"), [(16, 4), (16, 32), (3, 7)])
def test_rows_then_columns_are_torchs_bicubic(side: int, wanted: int) -> None:
    table = torch.randn(side, side, generator=torch.Generator().manual_seed(0))
    ours = bicubic(side, wanted) @ table @ bicubic(side, wanted).T
    theirs = torch.nn.functional.interpolate(table[None, None], (wanted, wanted), mode="bicubic")
    torch.testing.assert_close(ours, theirs[0, 0], rtol=0, atol=1e-5)


def test_methods_run_but_for_one_that_merges_patches_in_the_encoder(
    chat: QwenVL, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["methods", "--model", str(chat.folder), "--cr", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in lines}
    assert {name for name, row in rows.items() if row[0] == "yes"} >= {"utp", "divprune", "dpp"}
    assert rows["tome"][0] == "no" and "merges the patches of one tile" in rows["tome"][1]


def test_the_tokenizer_merges_by_rank(chat: QwenVL) -> None:
    """The control tokens are numbered on from the ranks."""
    tokenizer, _ = read_tokenizer(chat.folder)
    assert tokenizer.encode("what color") == [256 + 1, 256 + 7]
    assert tokenizer.encode("cé") == [ord("c"), *"é".encode()]
    assert tokenizer.encode("e\u0301") == list("é".encode()), "composed, as NFC has it"
    text = "<|im_start|>what<imgpad><|im_end|>"
    assert tokenizer.encode(text) == [RANKS + 1, 256 + 1, PAD, RANKS + 2]
    assert tokenizer.decode(tokenizer.encode("What's it,  é女 3?\n\n")) == "What's it,  é女 3?\n\n"


BAD = {
    "no base64": (
        lambda lines: [*lines[:9], b"\xff\xff 9", *lines[10:]],
        "line 10, is not a tok",
    ),
    "no rank": (lambda lines: [*lines[:9], lines[9].split()[0], *lines[10:]], "line 10, is not"),
    "a rank twice": (lambda lines: [*lines[:-1], lines[-2]], "does not rank every byte and ever"),
    "a byte missing": (lambda lines: lines[1:], "does not rank every byte and every token once"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_line_of_the_vocabulary_is_one_error(
    fault: str, tmp_path: Path, refused: Refused
) -> None:
    model, (change, says) = qwen_vl.checkpoint(tmp_path / "a"), BAD[fault]
    file = model.folder / "qwen.tiktoken"
    file.write_bytes(b"\n".join(change(file.read_bytes().splitlines())))
    assert says in refused("models", "--model", model.folder)


def test_the_commands_export_and_ask(
    chat: QwenVL, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Tokens leave before the decoder by the cross-attention; parity is checked on the way."""
    bundle = tmp_path / "bundle"
    options = ["--method", "prumerge", "--cr", "4", "--parity", "1", "-o", str(bundle)]
    assert main(["export", "--model", str(chat.folder), *options]) == 0
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert (manifest["parity"]["samples"], manifest["parity"]["ties"]) == (1, 0)
    assert manifest["text"]["eos_token_ids"] == [RANKS + 2, RANKS + 1, RANKS]
    assert manifest["decoder"]["max_positions"] == 2048, "beyond it the model is another"
    asked = ["--image", str(SCENE), "--prompt", QUESTION, "--temperature", "0", "--json"]
    assert main(["run", str(bundle), *asked, "--max-new-tokens", "3"]) == 0
    turn = json.loads(capfd.readouterr().out.splitlines()[-1])["turns"][0]
    assert len(turn["ids"]) == 3


def test_a_base_model_gets_the_bare_text(tmp_path: Path) -> None:
    model = qwen_vl.checkpoint(tmp_path / "a")
    (model.folder / "generation_config.json").unlink()
    adapter = open_model(str(model.folder))
    ids = adapter.chat.ids(adapter.media, "what")
    assert adapter.chat.tokenizer.decode(ids) == "Picture 1: <img><imgpad></img>\nwhat"
    assert adapter.read_ends() == (RANKS,)


def test_a_text_model_and_a_foreign_tokenizer_are_told(tmp_path: Path, refused: Refused) -> None:
    model = qwen_vl.checkpoint(tmp_path / "a")
    config = json.loads((model.folder / "config.json").read_text())
    vision = config.pop("visual")
    (model.folder / "config.json").write_text(json.dumps(config))
    assert "it has no 'visual'" in refused("models", "--model", model.folder)
    config["visual"] = vision | {"image_start_id": START + 1}
    (model.folder / "config.json").write_text(json.dumps(config))
    said = refused("models", "--model", model.folder)
    assert f"has <img> not at {START + 1}, where config.json has it" in said
