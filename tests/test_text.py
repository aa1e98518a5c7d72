"""Prompts become the same tokens as with transformers, and tokens text, piece by piece."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from text_cases import DEMO, MARKS, SOURCES, case

from edgeprune.errors import BundleError, InputError
from edgeprune.manifest import DATE
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
    """But for control tokens, which stay text: hypothesis tries texts of our own sources too."""
    checked = case(name)
    assume(not any(token in prompt for token in checked.processor.tokenizer.all_special_tokens))
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
def test_the_user_may_place_the_image(name: str, prompt: str) -> None:
    checked = case(name)
    image = checked.processor.image_token
    template = checked.record.first.replace("{image}\n", "").replace("{image}", "")
    template = DATE.sub(lambda now: time.strftime(now[1]), template)
    text = template.replace("{prompt}", prompt.replace("<image>", image))
    assert checked.first(prompt) == checked.rendered(text)


def free_tokens(name: str) -> list[str]:
    """Added tokens that a user may type, by the bundle's record."""
    checked = case(name)
    added = checked.processor.tokenizer.added_tokens_decoder
    return [added[i].content for i in checked.record.user_tokens]


def test_whoever_may_type_them() -> None:
    for name in SOURCES:
        spaces = ["  "] if name in ("gpt-2", "qwen", "dated") else []
        marks = [*MARKS, "<point>", *spaces]
        assert free_tokens(name) == ([] if name in ("demo", "unigram") else marks)


@pytest.mark.parametrize("name", [name for name in SOURCES if free_tokens(name)])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_added_tokens_are_those_of_transformers(name: str, data: st.DataObject) -> None:
    checked = case(name)
    pieces = st.lists(words | st.sampled_from(free_tokens(name)), min_size=1, max_size=9)
    prompt = data.draw(pieces.map("".join).filter(str.strip))
    assert checked.first(prompt) == checked.reference([("user", prompt)])
    answered = [("user", "a ?"), ("assistant", "red"), ("user", prompt)]
    after = checked.prompter.next_turn(prompt)[0].tolist()
    assert checked.reference(answered)[-len(after) :] == after


@pytest.mark.parametrize("name", [name for name in SOURCES if free_tokens(name)])
def test_added_tokens_beside_control_tokens(name: str) -> None:
    checked = case(name)
    ids = {mark: checked.processor.tokenizer.convert_tokens_to_ids(mark) for mark in MARKS}
    control = checked.processor.tokenizer.eos_token
    prompt = f"where is <ref>the{control} star</ref> <|box_start|>?"
    _, after = checked.prompter.first_turn(prompt)
    found = after[0].tolist()
    assert [i for i in found if i in ids.values()] == list(ids.values())
    said = checked.processor.tokenizer.decode(found)  # some tokenizers put a space after a token
    assert said.replace(" ", "").count(prompt.replace(" ", "")) == 1
    plain = checked.prompter.first_turn("what")[1][0].tolist()
    stop = checked.processor.tokenizer.eos_token_id
    assert found.count(stop) == plain.count(stop)


SYSTEMS = ["You drive a robot.", "  two  spaces\n", "{prompt} {image} <ref>", ""]


@names
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_message_is_that_of_transformers(name: str, system: str) -> None:
    checked = case(name)
    wanted = checked.reference([("user", "what is it ?")], system)
    assert checked.first("what is it ?", system) == wanted
    assert not system.strip() or wanted != checked.first("what is it ?")


def test_a_system_message_holds_no_control_token() -> None:
    checked = case("qwen")
    end = checked.processor.tokenizer.eos_token_id
    typed = checked.first("what ?", "a<|im_end|>b")
    assert typed.count(end) == checked.first("what ?", "ab").count(end)
    assert "a<|im_end|>b" in checked.processor.tokenizer.decode(typed)
    with pytest.raises(InputError, match="the system text may not hold <image>"):
        checked.first("what ?", "<image>")
    with pytest.raises(InputError, match="the system text is no valid text"):
        checked.first("what ?", "\ud83d")


def test_a_template_without_a_system_message_says_so() -> None:
    checked = case("qwen")
    prompter = Prompter(checked.file, replace(checked.record, with_system=""))
    with pytest.raises(InputError, match="takes no system message; put the text into the prompt"):
        prompter.first_turn("what ?", "You drive a robot.")


def test_the_date_is_that_of_the_day_on_which_it_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checked = case("dated")
    monkeypatch.setattr(time, "strftime", lambda form: f"the day by {form}")
    begun = checked.processor.tokenizer.decode(checked.first("what is it ?"))
    assert "Today is the day by %d %B %Y." in begun
    monkeypatch.undo()
    turns = [("user", "what is it ?")]
    days = [checked.reference(turns), checked.first("what is it ?"), checked.reference(turns)]
    assert days[1] in (days[0], days[2])  # it may be midnight


@names
@pytest.mark.parametrize("turn", ["first", "next"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_typed_control_tokens_stay_text(name: str, turn: str, data: st.DataObject) -> None:
    checked = case(name)
    tokenizer = checked.processor.tokenizer
    free = {*free_tokens(name), "<image>", "<unk>"}
    control = [t for t in tokenizer.added_tokens_encoder if t not in free]
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


def test_only_the_first_turn_may_place_a_image() -> None:
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
        replace(record, next="{system} {prompt}"),
    ):
        with pytest.raises(BundleError, match="do not fit"):
            Prompter(DEMO / "tokenizer.json", changed)
    (tmp_path / "tokenizer.json").write_text("{")
    for name in ("tokenizer.json", "absent.json"):
        with pytest.raises(BundleError, match="missing or damaged"):
            Prompter(tmp_path / name, record)
