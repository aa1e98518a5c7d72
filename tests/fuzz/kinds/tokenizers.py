"""Tokenizers altered with regard to their parts, the hash in the manifest mended."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.case import Case, command
from tests.fuzz.mutate import alter, parses
from tests.fuzz.seeds import QUESTION, Seeds

WEIGHT = 10

PARTS: tuple[tuple[str, Any], ...] = (
    (
        "post_processor",
        {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "[NONE]", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {},
        },
    ),
    (
        "post_processor",
        {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "x", "type_id": 0}}] * 5000,
            "pair": [],
            "special_tokens": {"x": {"id": "x", "ids": [10**9] * 99, "tokens": ["x"] * 99}},
        },
    ),
    ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    ("normalizer", {"type": "Precompiled", "precompiled_charsmap": ""}),
    ("normalizer", {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}),
    ("normalizer", {"type": "Replace", "pattern": {"String": ""}, "content": "xx"}),
    ("normalizer", {"type": "Prepend", "prepend": "x" * 99_999}),
    ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFKD"}] * 5000}),
    (
        "pre_tokenizer",
        {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
    ),
    (
        "pre_tokenizer",
        {"type": "Split", "pattern": {"Regex": "(a|a)*$"}, "behavior": "Removed", "invert": True},
    ),
    (
        "pre_tokenizer",
        {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True, "trim_offsets": True},
    ),
    ("pre_tokenizer", {"type": "Metaspace", "replacement": "__", "prepend_scheme": "always"}),
    (
        "truncation",
        {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 0},
    ),
    ("truncation", {"direction": "Left", "max_length": 3, "strategy": "OnlySecond", "stride": 9}),
    (
        "padding",
        {
            "strategy": {"Fixed": 10**9},
            "direction": "Left",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "x",
        },
    ),
    (
        "padding",
        {
            "strategy": "BatchLongest",
            "direction": "Right",
            "pad_to_multiple_of": 10**8,
            "pad_id": 2**31,
            "pad_type_id": 0,
            "pad_token": "x",
        },
    ),
    ("decoder", {"type": "Strip", "content": "x", "start": 2**40, "stop": 2**40}),
    ("decoder", {"type": "Replace", "pattern": {"Regex": "(e+)+$"}, "content": ""}),
    ("decoder", {"type": "ByteFallback"}),
    ("decoder", {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True}),
    (
        "model",
        {
            "type": "WordPiece",
            "vocab": {"[UNK]": 0},
            "unk_token": "[NONE]",
            "continuing_subword_prefix": "",
            "max_input_chars_per_word": 2**60,
        },
    ),
    ("model", {"type": "Unigram", "vocab": [], "unk_id": 7, "byte_fallback": False}),
    (
        "model",
        {"type": "Unigram", "vocab": [["a", 1e308]], "unk_id": 0, "byte_fallback": True},
    ),
    ("model", {"type": "BPE", "vocab": {"a": 4294967295}, "merges": [], "dropout": 1.0}),
    (
        "added_tokens",
        [
            {
                "id": 2**31,
                "content": "<image>",
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
        ],
    ),
    (
        "added_tokens",
        [
            {
                "id": 0,
                "content": "",
                "special": True,
                "single_word": True,
                "lstrip": True,
                "rstrip": True,
                "normalized": True,
            }
        ],
    ),
    ("version", "99.0"),
)
PROMPTS = (QUESTION, "a" * 60 + "!", "aaaa <image> x", "e" * 200, "\U0001f600 <unk> </s>")


def make(rng: Random, seeds: Seeds, folder: Path) -> Case:
    bundle = Path(shutil.copytree(seeds.bundle, folder / "bundle"))
    file = bundle / "tokenizer.json"
    tree = json.loads(file.read_text())
    if rng.random() < 0.45:
        part, value = rng.choice(PARTS)
        tree[part] = value
        text, note = json.dumps(tree), f"{part} = {str(value)[:80]}"
    else:
        part = rng.choice(
            ["model", "added_tokens", "post_processor", "normalizer", "decoder", "all"]
        )
        inner = tree if part == "all" or not tree.get(part) else tree[part]
        altered, note = alter({"x": inner}, rng)
        altered = altered.removeprefix('{"x": ').removesuffix("}")
        if inner is tree:
            text = altered
        else:
            tree[part] = "@@part@@"
            text = json.dumps(tree).replace('"@@part@@"', altered)
    file.write_text(text)
    mend(bundle)
    ask = command(
        *("run", bundle, "--image", seeds.image, "--prompt", rng.choice(PROMPTS)),
        *("--max-new-tokens", 3, "--threads", 1),
    )
    return Case(ask, note, parses(text))


def mend(bundle: Path) -> None:
    """Write sizes and hashes of the files as they are now into the manifest."""
    file = bundle / "manifest.json"
    manifest = json.loads(file.read_text())
    for name, record in manifest["files"].items():
        content = (bundle / name).read_bytes()
        record["bytes"], record["sha256"] = len(content), hashlib.sha256(content).hexdigest()
    file.write_text(json.dumps(manifest))
