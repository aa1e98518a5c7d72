"""Chat templates and generation settings are frozen as they are, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from text_cases import CHATML, LLAVA, STRINGS, built, byte_level, case, demo, transformers_llama

from edgeprune.errors import ModelError
from edgeprune.export import prompts
from edgeprune.export.generation import Generation
from edgeprune.generation import Sampling


def text_record(source: Any, config: Any) -> Any:
    return prompts.text_record(source, config, Generation(Sampling(), (2,)))


def test_the_record_of_llava() -> None:
    record = case("llama").record
    assert record.first == "USER: {image}\n{prompt} ASSISTANT:"
    assert record.next == " USER: {prompt} ASSISTANT:"
    assert record.eos_token_ids == (2,) and record.system == ""
    assert record.add_special_tokens and not case("mistral").record.add_special_tokens
    assert case("mistral").record.next == "</s>[INST] {prompt} [/INST]"


def test_contents_may_be_strings() -> None:
    processor, config, _ = built(byte_level(), STRINGS)
    record = text_record(processor, config)
    assert record.first == "### user: {image}\n{prompt}\n### assistant:"
    assert record.next == "\n### user: {prompt}\n### assistant:"
    assert record.eos_token_ids == (2,)


def test_a_tokenizer_alone_will_do() -> None:
    processor, config, _ = built(byte_level(), None)
    processor.tokenizer.chat_template = LLAVA
    record = text_record(processor.tokenizer, config)
    assert record.first == "USER: {image}\n{prompt} ASSISTANT:"
    assert record == text_record(processor, config)


def test_without_a_template_llava_gets_its_own() -> None:
    processor, config, _ = built(transformers_llama(), None)
    record = text_record(processor, config)
    assert record.first == "USER: {image}\n{prompt} ASSISTANT:"
    assert record.next == "</s>USER: {prompt} ASSISTANT:"
    assert "no chat template" in prompts.notes(processor, config)[0]
    config.model_type = "llava_next"
    with pytest.raises(ModelError, match="has no chat template"):
        text_record(processor, config)


def test_templates_that_cannot_be_frozen_are_refused() -> None:
    for template, message in [
        ("{{ messages[0]['role'] }}", "does not show one <image>"),
        ("{{ messages | length }} " + CHATML.replace("<|image_pad|>", "<image>"), "rewrites"),
    ]:
        processor, config, _ = built(byte_level(), template)
        with pytest.raises(ModelError, match=message):
            text_record(processor, config)


def test_an_image_token_that_is_no_token_is_refused() -> None:
    processor, config, _ = built(byte_level(), LLAVA)
    for number in (None, 10**6):
        config.image_token_id = number
        with pytest.raises(ModelError, match="image token"):
            text_record(processor, config)


def test_the_notes_say_what_is_left_out() -> None:
    assert prompts.notes(*demo()[:2]) == ()
    processor, config, _ = built(byte_level(), CHATML, "<|image_pad|>")
    assert "what the template puts around" in prompts.notes(processor, config)[0]
    trimmed = LLAVA.replace("content['text']", "content['text'] | trim")
    processor, config, _ = built(byte_level(), trimmed)
    assert [note.split()[:3] for note in prompts.notes(processor, config)] == [
        ["the", "chat", "template"]
    ]
