"""Chat templates and generation settings are frozen as they are, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Refused
from text_cases import CHATML, LLAVA, STRINGS, built, byte_level, case, demo, transformers_llama

from edgeprune.cli import main
from edgeprune.demo import SAMPLES_DIR
from edgeprune.errors import ModelError
from edgeprune.export import prompts
from edgeprune.export.generation import Generation
from edgeprune.generation import Sampling
from edgeprune.manifest import TextRecord
from edgeprune.models._media import Media
from edgeprune.models.llava import TURNS


def read_text(source: Any, config: Any) -> prompts.Text:
    return prompts.read_text(source, config, Generation(Sampling(), (2,)), 1000)


def text_record(source: Any, config: Any) -> TextRecord:
    return read_text(source, config).record


def notes(source: Any, config: Any) -> tuple[str, ...]:
    return read_text(source, config).notes


def test_the_record_of_llava() -> None:
    record = case("llama").record
    assert record.first == "USER: {image}\n{prompt} ASSISTANT:"
    assert record.next == " USER: {prompt} ASSISTANT:"
    assert record.eos_token_ids == (2,)
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
    generation = Generation(Sampling(), (2,))
    media = Media.of_images(config, 1, assumed=TURNS)
    text = prompts.read_text(processor, config, generation, 1000, media)
    assert text.record.first == "USER: {image}\n{prompt} ASSISTANT:"
    assert text.record.next == "</s>USER: {prompt} ASSISTANT:"
    assert text.notes[0] == "the checkpoint has no chat template; LLaVA-1.5's is used"
    assert Media.of_images(config, 2, assumed=TURNS).assumed is None
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
    assert notes(*demo()[:2]) == ()
    processor, config, _ = built(byte_level(), CHATML, "<|image_pad|>")
    assert "what the template puts around" in notes(processor, config)[0]
    trimmed = LLAVA.replace("content['text']", "content['text'] | trim")
    processor, config, _ = built(byte_level(), trimmed)
    assert [note.split()[:3] for note in notes(processor, config)] == [["the", "chat", "template"]]


def dated(form: str) -> str:
    return CHATML.replace("You are a helpful assistant.", form)


def test_dates_are_holes_and_told() -> None:
    processor, config, _ = built(
        byte_level(), dated("{{ strftime_now('%d %b %Y') }}"), "<|image_pad|>"
    )
    text = read_text(processor, config)
    assert text.record.first.startswith("<|im_start|>system\n{now:%d %b %Y}<|im_end|>")
    assert "the runtime takes that of the device's clock" in text.notes[-1]


@pytest.mark.parametrize(
    "form", ["{{ strftime_now('%Y')[:2] }}", "{{ strftime_now('%Y') | int + 1 }}"]
)
def test_a_template_that_reckons_with_dates_is_refused(form: str) -> None:
    processor, config, _ = built(byte_level(), dated(form), "<|image_pad|>")
    with pytest.raises(ModelError, match="makes something else of today's date"):
        read_text(processor, config)


def test_a_date_that_is_not_written_is_no_matter() -> None:
    form = "{% set now = strftime_now('%Y') %}You are a helpful assistant."
    processor, config, _ = built(byte_level(), dated(form), "<|image_pad|>")
    assert text_record(processor, config).first == case("qwen").record.first


LAST = "messages | selectattr('role', 'equalto', 'user') | list | last"
NO_SYSTEM = {
    "refused": CHATML.replace(
        "{% for message in messages %}",
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ raise_exception('no system') }}{% endif %}",
    ),
    "moved to the last turn": CHATML.replace(
        "<|im_start|>{{ message['role'] }}\n",
        "{% if message['role'] != 'system' %}<|im_start|>{{ message['role'] }}\n"
        f"{{% if message == {LAST} and messages[0]['role'] == 'system' %}}"
        "{{ messages[0]['content'][0]['text'] }}{% endif %}",
        1,
    ).replace("<|im_end|>\n{% endfor %}", "<|im_end|>\n{% endif %}{% endfor %}"),
}


@pytest.mark.parametrize("template", NO_SYSTEM.values(), ids=NO_SYSTEM.keys())
def test_templates_that_take_no_system_message(template: str) -> None:
    processor, config, _ = built(byte_level(), template, "<|image_pad|>")
    record = text_record(processor, config)
    assert record.with_system == "" and record.first == case("qwen").record.first


def test_the_system_message_has_a_hole() -> None:
    record = case("qwen").record
    assert record.with_system == record.first.replace("You are a helpful assistant.", "{system}")
    assert case("llama").record.with_system == "{system} USER: {image}\n{prompt} ASSISTANT:"


def test_letters_that_look_like_control_tokens_are_told() -> None:
    """As in a published template, which ends its answers with <\\s>."""
    template = LLAVA.replace(
        "{{ content['text'] + ' '}}{% endg", "{{ content['text'] + '<\\\\s>' }}{% endg"
    )
    processor, config, _ = built(transformers_llama(), template)
    text = read_text(processor, config)
    assert text.record.next.startswith("<\\s>")
    (note,) = text.notes
    assert "the chat template writes <\\s>, which this tokenizer reads as letters" in note


def edited(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A checkpoint whose tokenizer.json was changed."""
    content = json.loads((checkpoint / "tokenizer.json").read_text())
    change(content)
    (checkpoint / "tokenizer.json").write_text(json.dumps(content))
    return checkpoint


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    copy_checkpoint: Callable[[], Path], tmp_path: Path, refused: Refused
) -> None:
    checkpoint = edited(copy_checkpoint(), lambda c: c["model"]["vocab"].update(zebra=400))
    line = refused("export", "--model", checkpoint, "--method", "none", "-o", tmp_path / "bundle")
    assert "the token 'zebra' with id 400, the model's embedding 66 rows" in line


def test_an_added_token_without_an_embedding_stays_letters(
    copy_checkpoint: Callable[[], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    new = [{"id": i, "content": f"<ref{i}>", "special": True, **flags} for i in range(60, 70)]
    checkpoint = edited(copy_checkpoint(), lambda c: c["added_tokens"].extend(new))
    options = ["--model", str(checkpoint), "--method", "none", "--parity", "0"]
    capfd.readouterr()
    assert main(["export", *options, "-o", str(tmp_path / "bundle")]) == 0
    assert "note: the tokenizer's added token '<ref69>' has id" in capfd.readouterr().err
    image = str(SAMPLES_DIR / "scene-1.png")
    asked = ["--image", image, "--prompt", "is the <ref69> red ?", "--max-new-tokens", "4"]
    assert main(["run", str(tmp_path / "bundle"), *asked]) == 0


def test_run_takes_a_system_message(
    tiny_bundle: Path, capfd: pytest.CaptureFixture[str], refused: Refused
) -> None:
    image = str(SAMPLES_DIR / "scene-1.png")
    asked = ["run", str(tiny_bundle), "--image", image, "--prompt", "what ?", "--json"]
    counts = []
    for options in ([], ["--system", "what color is the star ?"]):
        capfd.readouterr()
        assert main([*asked, *options]) == 0
        counts.append(json.loads(capfd.readouterr().out)["turns"][0]["prompt_tokens"])
    words = 7  # of the message, and USER: before it
    assert counts[1] == counts[0] + words
    assert "the system text may not hold <image>" in refused(*asked, "--system", "<image>")
