"""Tokenizers from strangers: panics, errors without a name, expressions that take for ever."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeprune.cli import main
from edgeprune.errors import BundleError, InputError
from edgeprune.runtime import tokenizer
from edgeprune.runtime.tokenizer import SafeTokenizer
from tests.conftest import Refused
from tests.hostile import replace_file
from tests.test_errors_bundle import QUESTION

Copy = Callable[[], Path]
ENDLESS = {"Regex": "(a+)+$"}
LETTERS = "a" * 60 + "b"


def split(pattern: Any) -> dict[str, Any]:
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def replace(pattern: Any, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def template(*pieces: Any, **tokens: Any) -> dict[str, Any]:
    alone = {"Sequence": {"id": "A", "type_id": 0}}
    both = [alone, {"Sequence": {"id": "B", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": [*pieces, alone],
        "pair": both,
        "special_tokens": tokens,
    }


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "missing id": (
        {"post_processor": template({"SpecialToken": {"id": "<nosuch>", "type_id": 0}})},
        "tokenizer.json cannot read this prompt (no entry found for key)",
    ),
    "characters": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        "tokenizer.json is missing or damaged (Precompiled",
    ),
    "expression": (
        {"pre_tokenizer": split(ENDLESS), "normalizer": None},
        "tokenizer.json cannot read this prompt (Onig: Regex search error: retry-limit",
    ),
    "normalizer": (
        {"normalizer": replace(ENDLESS, "x")},
        "tokenizer.json cannot read this prompt (Onig: Regex search error: retry-limit",
    ),
    "decoder": (
        {"decoder": replace(ENDLESS, "x")},
        "tokenizer.json is missing or damaged (its decoder has a regular expression)",
    ),
    "growth": (
        {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [replace({"String": "a"}, "aa")] * 40,
            }
        },
        "(its normalizer makes a text 1,099,511,627,776 times longer)",
    ),
    "growing answers": (
        {"decoder": replace({"String": "a"}, "a" * 1000)},
        "(its decoder makes a text 1,000 times longer)",
    ),
    "large part": (
        {
            "post_processor": template(
                **{"<s>": {"id": "<s>", "ids": [1] * 2_100_000, "tokens": []}}
            )
        },
        "its post_processor has",
    ),
    "no model": ({"model": {"type": "Nosuch"}}, "is missing or damaged"),
    "no image token": ({"added_tokens": []}, "do not fit"),
}


@pytest.mark.parametrize(("change", "says"), FAULTS.values(), ids=FAULTS.keys())
def test_a_tokenizer_that_no_export_writes(
    change: dict[str, Any], says: str, copy_bundle: Copy, refused: Refused
) -> None:
    data = json.loads(((bundle := copy_bundle()) / "tokenizer.json").read_text())
    replace_file(bundle, "tokenizer.json", json.dumps(data | change).encode())
    line = refused("run", bundle, *QUESTION[:2], "--prompt", LETTERS)
    assert says in line, line


def test_ids_with_two_thousand_million_between_them(copy_bundle: Copy, refused: Refused) -> None:
    data = json.loads(((bundle := copy_bundle()) / "tokenizer.json").read_text())
    data["model"]["vocab"]["star"] = 2**31 - 1
    replace_file(bundle, "tokenizer.json", json.dumps(data).encode())
    line = refused("run", bundle, *QUESTION[:2], "--prompt", "what is </s> ?")
    assert "(its largest id is 2,147,483,647, at most 16,777,216 is read)" in line


def test_an_image_token_that_another_token_swallows(copy_bundle: Copy, refused: Refused) -> None:
    data = json.loads(((bundle := copy_bundle()) / "tokenizer.json").read_text())
    longer = {**data["added_tokens"][0], "id": 66, "content": "USER: <image>"}
    data["added_tokens"].append(longer)
    replace_file(bundle, "tokenizer.json", json.dumps(data).encode())
    line = refused("run", bundle, *QUESTION)
    assert "does not read the bundle's image token as one token; export the bundle again" in line


def test_a_text_that_was_to_be_cut_is_not(
    copy_bundle: Copy, capfd: pytest.CaptureFixture[str]
) -> None:
    data = json.loads(((bundle := copy_bundle()) / "tokenizer.json").read_text())
    cut = {"max_length": 0, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    pad = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None}
    pad |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
    data |= {"truncation": cut, "padding": pad}
    replace_file(bundle, "tokenizer.json", json.dumps(data).encode())
    command = ["run", str(bundle), *map(str, QUESTION), "--max-new-tokens", "1", "--json"]
    assert main(command) == 0
    assert 5 < json.loads(capfd.readouterr().out)["turns"][0]["prompt_tokens"] < 30


@pytest.mark.parametrize(
    "text", ["", "{}", "[" * 100_000, '{"model": ' * 300, "\x00"], ids=range(5)
)
def test_a_file_that_is_no_tokenizer(text: str, copy_bundle: Copy, refused: Refused) -> None:
    replace_file(bundle := copy_bundle(), "tokenizer.json", text.encode())
    assert "tokenizer.json is missing or damaged" in refused("run", bundle, *QUESTION)


def test_a_text_that_takes_for_ever(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The expression stays below the library's own limit at every offset, and there are many."""
    data = json.loads((tiny_bundle / "tokenizer.json").read_text())
    data |= {"pre_tokenizer": split(ENDLESS), "normalizer": None}
    (file := tmp_path / "tokenizer.json").write_text(json.dumps(data))
    monkeypatch.setattr(tokenizer, "SECONDS", 0.2)
    start = time.monotonic()
    with pytest.raises(BundleError, match=r"cannot read this prompt \(it took longer than 0.2 s\)"):
        SafeTokenizer.open(file).encode(("a" * 20 + "b") * 20)
    assert time.monotonic() - start < 60  # where it is not stopped: some 20 times as long


def test_limits(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    monkeypatch.setattr(tokenizer, "TEXT", 1000)
    with pytest.raises(InputError, match=r"has 1,001 characters, at most 1,000 are read"):
        SafeTokenizer.open(tiny_bundle / "tokenizer.json").encode("a" * 1001)
    monkeypatch.setattr(tokenizer, "TOKENIZER_BYTES", 100)
    assert "bytes, at most 100 are read" in refused("run", tiny_bundle, *QUESTION)


def test_an_interrupt_stays_one(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    safe = SafeTokenizer.open(tiny_bundle / "tokenizer.json")

    def interrupted(*_: object) -> list[int]:
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer, "_ids", interrupted)
    with pytest.raises(KeyboardInterrupt):
        safe.encode("a")
