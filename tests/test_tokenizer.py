"""tokenizer.json is read as it is stored, whatever transformers builds from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from text_cases import llama
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

from edgeprune.errors import ModelError
from edgeprune.export.prompts import save_tokenizer
from edgeprune.models import open_model
from edgeprune.models._chat import Chat
from edgeprune.models._processor import Processor
from edgeprune.models._tokenizer import read_tokenizer
from tests.qwen import plain_checkpoint

PROMPT = "USER: <image>\nwhat color is it ? ASSISTANT:"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer that marks the start of every text in its normalizer, as LLaVA's do."""
    llama(legacy=True).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "LlamaTokenizer"
    for name in ("bos_token", "eos_token"):  # which the class knows
        settings.pop(name)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def of_family(folder: Path, family: str) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    return folder


@pytest.mark.parametrize("family", ["llava_next_video", "video_llava", "internvl"])
def test_what_transformers_builds_anew_is_read_as_stored(family: str, folder: Path) -> None:
    chat = Chat(of_family(folder, family))
    stored = Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(folder)
    assert chat.tokenizer.encode(PROMPT) == stored.encode(PROMPT).ids != theirs.encode(PROMPT)
    assert (chat.tokenizer.bos_token, chat.tokenizer.eos_token_id) == ("<s>", 2)
    (note,) = chat.notes
    assert "used as it is stored; transformers 5 builds a LlamaTokenizer from it" in note


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_where_both_agree_there_is_nothing_to_tell(family: str, folder: Path) -> None:
    tokenizer, notes = read_tokenizer(of_family(folder, family))
    assert notes == ()
    assert tokenizer.encode(PROMPT) == AutoTokenizer.from_pretrained(folder).encode(PROMPT)


def test_a_bundle_has_the_stored_one(tmp_path: Path) -> None:
    """Qwen's own class rebuilds it to the same."""
    checkpoint = plain_checkpoint(tmp_path / "checkpoint")
    processor = Processor(open_model(str(checkpoint)))
    assert processor.chat.notes == ()
    save_tokenizer(processor, tmp_path / "tokenizer.json")
    saved, stored = (
        Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (tmp_path, checkpoint)
    )
    text = "<|im_start|>user\nwhat's it, é女  3?<|im_end|>"
    assert saved.encode(text).ids == stored.encode(text).ids


def test_a_damaged_one_is_named(copy_checkpoint: Callable[[], Path]) -> None:
    (checkpoint := copy_checkpoint()).joinpath("tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="has no usable processor or tokenizer"):
        read_tokenizer(checkpoint)


def test_no_code_of_a_folder_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would ask on the terminal whether to run what config.json names."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {letter: number for number, letter in enumerate(sorted(letters))} | {"wh": 256}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nw h\n")
    settings = {"tokenizer_class": "Qwen2Tokenizer", "unk_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    code = {"auto_map": {"AutoConfig": "code.Config"}, "model_type": "internvl_chat"}
    (tmp_path / "config.json").write_text(json.dumps(code))
    (tmp_path / "code.py").write_text("raise SystemExit")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    tokenizer, notes = read_tokenizer(tmp_path)
    assert (tokenizer.encode("what")[0], notes) == (256, ())
    settings = {"tokenizer_class": "OwnTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="names the tokenizer OwnTokenizer, which transformers"):
        read_tokenizer(tmp_path)
