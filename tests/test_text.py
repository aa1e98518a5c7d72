"""Prompts become the same tokens as with transformers, and tokens text, piece by piece."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_cases import DEMO, SOURCES, case

from edgeprune.errors import BundleError, InputError
from edgeprune.runtime.text import Prompter

names = pytest.mark.parametrize("name", SOURCES)
PROMPTS = [
    "what color is the star ?",
    " leading and trailing  spaces ",
    "\nnew\n\nlines\n",
    "Wo ist das Mädchen? 女の子 👩‍👧 <not a token> {prompt} {image} %s",
    "?",
    "a",
]


@names
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_first_turn_is_that_of_transformers(name: str, prompt: str) -> None:
    checked = case(name)
    assert checked.first(prompt) == checked.reference([("user", prompt)])


words = st.sampled_from(["what", "color", " ", "  ", "\n", "'s", "?", "<", "é", "女", "7", "USER:"])
texts = st.lists(words, min_size=1, max_size=9).map("".join).filter(str.strip)


@names
@settings(max_examples=25, deadline=None)
@given(prompt=texts | st.text(min_size=1, max_size=20).filter(str.strip))
def test_any_prompt_is_that_of_transformers(name: str, prompt: str) -> None:
    checked = case(name)
    assert checked.first(prompt) == checked.reference([("user", prompt)])


@names
@pytest.mark.parametrize("answer", ["red", "there is a star", "There are 3 stars."])
@settings(max_examples=10, deadline=None)
@given(question=texts)
def test_a_second_turn_is_that_of_transformers(name: str, answer: str, question: str) -> None:
    checked = case(name)
    begun, after = checked.first("what is it ?"), checked.prompter.next_turn(question)[0].tolist()
    turns = [("user", "what is it ?"), ("assistant", answer), ("user", question)]
    whole = checked.reference(turns)
    assert whole[: len(begun)] == begun
    assert whole[-len(after) :] == after
    between = checked.processor.tokenizer.decode(whole[len(begun) : -len(after)])
    if name == "demo":  # a tokenizer of whole, lower-case words
        between = between.replace(" .", ".")
        answer = answer.lower()
    assert between.strip() == answer


@names
@pytest.mark.parametrize(
    "prompt", ["<image>\nwhat is it ?", "what is <image> here", "is it <image>"]
)
def test_the_user_may_place_the_picture(name: str, prompt: str) -> None:
    checked = case(name)
    image = checked.processor.image_token
    template = checked.record.first.replace("{image}\n", "").replace("{image}", "")
    text = template.replace("{prompt}", prompt.replace("<image>", image))
    assert checked.first(prompt) == checked.rendered(text)


@names
@pytest.mark.parametrize("turn", ["first", "next"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_typed_control_tokens_stay_text(name: str, turn: str, data: st.DataObject) -> None:
    checked = case(name)
    tokenizer = checked.processor.tokenizer
    control = [t for t in tokenizer.added_tokens_encoder if t not in ("<image>", "<unk>")]
    pieces = st.lists(st.sampled_from([*control, "what", " ", "</", "s>", "a"]), min_size=1)
    prompt = data.draw(pieces.map("".join).filter(str.strip))

    def controls(text: str) -> list[int]:
        ids = (
            checked.first(text) if turn == "first" else checked.prompter.next_turn(text)[0].tolist()
        )
        added = {tokenizer.added_tokens_encoder[t] for t in control} | {
            checked.record.image_token_id
        }
        return [i for i in ids if i in added]

    try:
        assert controls(prompt) == controls("what")
    except InputError as error:
        assert name in ("demo", "unigram") and "control token" in str(error)


def test_a_typed_control_token_keeps_its_letters() -> None:
    for name in ("llama", "llama, legacy", "gpt-2", "qwen", "mistral, first"):
        prompter = case(name).prompter
        _, ids = prompter.first_turn("what is </s> or <|im_end|> or <tool_call> here")
        assert "what is </s> or <|im_end|> or <tool_call> here" in prompter.decode(ids[0])
        ids = prompter.next_turn("</s> or <|im_end|>")
        assert "</s> or <|im_end|>" in prompter.decode(ids[0])


REFUSED = {
    "": "is empty",
    " \n": "is empty",
    "<image>": "is empty",
    "<image> or <image> ?": "2 times; keep one",
    "half a pair \ud83d": "no valid text",
}


@pytest.mark.parametrize("prompt", REFUSED)
def test_a_prompt_that_cannot_be_used_is_refused(prompt: str) -> None:
    prompter = case("demo").prompter
    with pytest.raises(InputError, match=REFUSED[prompt]):
        prompter.first_turn(prompt)
    with pytest.raises(InputError):
        prompter.next_turn(prompt)


def test_only_the_first_turn_may_place_a_picture() -> None:
    with pytest.raises(InputError, match="only the first prompt may hold <image>"):
        case("demo").prompter.next_turn("and <image> ?")


@names
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_pieces_are_the_text(name: str, data: st.DataObject) -> None:
    checked = case(name)
    tokenizer = checked.processor.tokenizer
    written = tokenizer.encode(data.draw(texts | st.text("aé女👩 \n", max_size=9)))
    random = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=20))
    ids = data.draw(st.sampled_from([written, random, random + written + random]))
    pieces = list(checked.prompter.pieces(iter(ids)))
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(pieces) == checked.prompter.decode(ids) == text
    assert "" not in pieces
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)


def test_pieces_come_as_soon_as_they_can() -> None:
    for name in ("llama", "gpt-2", "demo"):
        checked = case(name)
        ids = checked.processor.tokenizer.encode("what color is the star", add_special_tokens=False)
        pieces = list(checked.prompter.pieces(ids))
        assert len(pieces) == len(ids)
        for count in range(len(ids)):
            assert "".join(pieces[:count]) == checked.prompter.decode(ids[:count])


def test_a_character_of_many_bytes_comes_whole() -> None:
    for name in ("llama", "gpt-2"):
        checked = case(name)
        ids = checked.processor.tokenizer.encode("a👩b", add_special_tokens=False)
        assert len(ids) > 5
        assert [p for p in checked.prompter.pieces(ids) if p.strip("ab")] in (["👩"], ["👩b"])


def test_a_bundle_whose_parts_do_not_fit_is_refused(tmp_path: Path) -> None:
    record = case("demo").record
    for changed in (
        replace(record, image_token_id=60_000),
        replace(record, first="{prompt}"),
        replace(record, next="{prompt} {prompt}"),
    ):
        with pytest.raises(BundleError, match="do not fit"):
            Prompter(DEMO / "tokenizer.json", changed)
    (tmp_path / "tokenizer.json").write_text("{")
    for name in ("tokenizer.json", "absent.json"):
        with pytest.raises(BundleError, match="missing or damaged"):
            Prompter(tmp_path / name, record)
