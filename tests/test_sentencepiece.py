"""tokenizer.model is read without SentencePiece."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from edgeprune.errors import ModelError
from edgeprune.models._tokenizer import read_tokenizer
from tests.originals import PIECES, SPECIALS, internlm_tokenizer, sentencepiece

FIRST = 3 + 256
"""Id of the first piece that is no byte."""


def merged(text: str) -> list[int]:
    """What SentencePiece does: of all neighbours the pair whose piece is the best becomes one."""
    scores = {piece: -rank for rank, piece in enumerate(PIECES)}
    parts = list("\u2581" + text.replace(" ", "\u2581"))
    while True:
        pairs = [(scores.get(a + b), -n) for n, (a, b) in enumerate(pairwise(parts))]
        known = [(score, n) for score, n in pairs if score is not None]
        if not known:
            break
        at = -max(known)[1]
        parts[at : at + 2] = ["".join(parts[at : at + 2])]
    ids = list[int]()
    for part in parts:
        known_id = [FIRST + PIECES.index(part)] if part in PIECES else []
        ids += known_id or [3 + byte for byte in part.encode()]
    return ids


def test_pieces_merge_by_their_scores_and_others_are_bytes(tmp_path: Path) -> None:
    internlm_tokenizer(tmp_path)
    tokenizer, notes = read_tokenizer(tmp_path)
    assert notes == ()
    for text in ("what color is what?", "whatwhat  color", "é女 what", "orol\n"):
        assert tokenizer.encode(text) == [1, *merged(text)]
        assert tokenizer.decode(merged(text)) == text


def test_added_tokens_lie_on_pieces_and_beyond(tmp_path: Path) -> None:
    """Each stretch of text between them is encoded by itself."""
    total = internlm_tokenizer(tmp_path)
    tokenizer, _ = read_tokenizer(tmp_path)
    first = total - len(SPECIALS)
    assert [tokenizer.convert_tokens_to_ids(t) for t in SPECIALS] == list(range(first, total))
    start, image = first + 1, first + 4
    ids = tokenizer.encode("<|im_start|>what<IMG_CONTEXT>color", add_special_tokens=False)
    assert ids == [start, *merged("what"), image, *merged("color")]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)


def test_a_vicuna_like_folder_needs_no_settings(tmp_path: Path) -> None:
    sentencepiece(tmp_path / "tokenizer.model", PIECES)
    tokenizer, _ = read_tokenizer(tmp_path)
    assert tokenizer.encode("what color") == [1, *merged("what color")]
    assert tokenizer.eos_token == "</s>"


def test_what_cannot_be_read_is_told_in_a_line(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    sentencepiece(file, PIECES)
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    with pytest.raises(ModelError, match=r"tokenizer\.model is no whole SentencePiece voca"):
        read_tokenizer(tmp_path)
    sentencepiece(file, PIECES, squeeze=True)
    with pytest.raises(ModelError, match="has remove_extra_whitespaces, which is not supported"):
        read_tokenizer(tmp_path)
    file.write_bytes(whole)
    added = {"900": {"content": "<far>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    with pytest.raises(
        ModelError, match=r"the added token '<far>' has id 900, after tokenizer\.mo"
    ):
        read_tokenizer(tmp_path)
