"""Prompts become the same tokens as with transformers, and tokens text, piece by piece."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoConfig,
    AutoProcessor,
    GenerationConfig,
    LlamaTokenizer,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from edgeprune.errors import BundleError, InputError, ModelError
from edgeprune.export import prompts
from edgeprune.runtime.sampling import Sampling
from edgeprune.runtime.text import Prompter

DEMO = Path(__file__).parents[1] / "edgeprune" / "demo" / "model"
PICTURE = Image.new("RGB", (28, 28))
CORPUS = [
    "USER: ASSISTANT: what color is the star in this picture? It is red, below the green heart.",
    "how many blue circles are there? There are 3 of them; isn't it? user assistant system",
    "Where is the white square left of the yellow digit 7 ? You are a helpful assistant.",
] * 3

LLAVA = (  # the template of llava-hf/llava-1.5-7b-hf
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL = (  # as llava-v1.6-mistral, with the control tokens in the template
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "[INST] {% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %} [/INST]{% else %}"
    " {{ message['content'][0]['text'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
CHATML = (  # as Qwen2-VL, with its own system text
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRINGS = (  # contents are strings only
    "{% for m in messages %}{{ '### ' + m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}### assistant:{% endif %}"
)


def trained(pre_tokenizer: Any, **options: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a small BPE."""
    import json

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False, **options)
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


@cache
def llama_pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    start = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary, merges = trained(pre_tokenizers.Metaspace())
    names = [*start, *sorted(vocabulary, key=vocabulary.__getitem__)]
    return {name: number for number, name in enumerate(names)}, merges


def wrapped(tokenizer: Tokenizer, **names: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def llama(*, legacy: bool, scheme: str = "always") -> PreTrainedTokenizerFast:
    """LLaMA's tokenizer: `legacy` marks the start in the normalizer, else Metaspace does."""
    vocabulary, merges = llama_pieces()
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    if legacy:
        marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(marks)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<image>", "<pad>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return wrapped(tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def transformers_llama() -> LlamaTokenizer:
    vocabulary, merges = llama_pieces()
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges)
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)])
    return tokenizer


QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(*, regex: str | None = None) -> PreTrainedTokenizerFast:
    """GPT-2's tokenizer or, with its expression, Qwen's; no bos."""
    parts: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None)
    if regex:
        split = pre_tokenizers.Split(Regex(regex), "isolated")
        parts = pre_tokenizers.Sequence([split, parts])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary, merges = trained(parts, initial_alphabet=alphabet)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = parts, decoders.ByteLevel()
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<image>"]
    tokenizer.add_special_tokens([*names, "<|vision_start|>", "<|vision_end|>"])
    tokenizer.add_tokens(["<tool_call>"])
    return wrapped(tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


@dataclass(frozen=True)
class Case:
    """A checkpoint's text side, and our own reading of it."""

    processor: Any
    record: Any
    prompter: Prompter

    def reference(self, turns: list[tuple[str, str]]) -> list[int]:
        """transformers' ids of a conversation whose first turn shows the picture."""
        parts = [[{"type": "text", "text": text}] for _, text in turns]
        parts[0].insert(0, {"type": "image", "image": PICTURE})
        messages = [{"role": role, "content": p} for (role, _), p in zip(turns, parts, strict=True)]
        ids = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True
        )
        return self.once(ids[0])

    def rendered(self, text: str) -> list[int]:
        """transformers' ids of a string with the image token in it."""
        return self.once(self.processor(text=text, images=PICTURE)["input_ids"][0])

    def once(self, ids: list[int]) -> list[int]:
        """Ids with the run of image tokens shortened to one."""
        image = self.record.image_token_id
        return [i for at, i in enumerate(ids) if i != image or ids[at - 1] != image]

    def first(self, prompt: str) -> list[int]:
        before, after = self.prompter.first_turn(prompt)
        assert before.dtype == after.dtype == "int64"
        assert before.ndim == after.ndim == 2 and len(before) == len(after) == 1
        return [*before[0].tolist(), self.record.image_token_id, *after[0].tolist()]


def built(tokenizer: Any, template: str | None, image: str = "<image>") -> Any:
    picture = CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    processor = LlavaProcessor(picture, tokenizer, 14, "full", template, image)
    config = SimpleNamespace(image_token_id=processor.image_token_id, model_type="llava")
    return processor, config, GenerationConfig(eos_token_id=tokenizer.eos_token_id)


def demo() -> Any:
    return (
        AutoProcessor.from_pretrained(DEMO),
        AutoConfig.from_pretrained(DEMO),
        GenerationConfig.from_pretrained(DEMO),
    )


SOURCES: dict[str, Callable[[], Any]] = {
    "demo": demo,
    "llama": lambda: built(transformers_llama(), LLAVA),
    "llama, first": lambda: built(llama(legacy=False, scheme="first"), LLAVA),
    "llama, always": lambda: built(llama(legacy=False), LLAVA),
    "llama, legacy": lambda: built(llama(legacy=True), LLAVA),
    "mistral": lambda: built(llama(legacy=True), MISTRAL),
    "mistral, first": lambda: built(llama(legacy=False, scheme="first"), MISTRAL),
    "gpt-2": lambda: built(byte_level(), LLAVA),
    "qwen": lambda: built(byte_level(regex=QWEN), CHATML, "<|image_pad|>"),
}


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    @cache
    def case(name: str) -> Case:
        processor, config, generation = SOURCES[name]()
        file = tmp_path_factory.mktemp("text") / "tokenizer.json"
        prompts.save_tokenizer(processor, file)
        record = prompts.text_record(processor, config, generation)
        return Case(processor, record, Prompter(file, record))

    return case


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
def test_the_first_turn_is_that_of_transformers(
    name: str, prompt: str, cases: Callable[[str], Case]
) -> None:
    case = cases(name)
    assert case.first(prompt) == case.reference([("user", prompt)])


words = st.sampled_from(["what", "color", " ", "  ", "\n", "'s", "?", "<", "é", "女", "7", "USER:"])
texts = st.lists(words, min_size=1, max_size=9).map("".join).filter(str.strip)


@names
@settings(max_examples=25, deadline=None)
@given(prompt=texts | st.text(min_size=1, max_size=20).filter(str.strip))
def test_any_prompt_is_that_of_transformers(
    name: str, prompt: str, cases: Callable[[str], Case]
) -> None:
    case = cases(name)
    assert case.first(prompt) == case.reference([("user", prompt)])


@names
@pytest.mark.parametrize("answer", ["red", "it is red", "There are 3 stars"])
@settings(max_examples=10, deadline=None)
@given(question=texts)
def test_a_second_turn_is_that_of_transformers(
    name: str, answer: str, cases: Callable[[str], Case], question: str
) -> None:
    case = cases(name)
    begun, after = case.first("what is it ?"), case.prompter.next_turn(question)[0].tolist()
    turns = [("user", "what is it ?"), ("assistant", answer), ("user", question)]
    whole = case.reference(turns)
    assert whole[: len(begun)] == begun
    assert whole[-len(after) :] == after
    between = case.processor.tokenizer.decode(whole[len(begun) : -len(after)])
    assert between.strip() in (answer, "it is red", "there are 3 stars", "there are 3 <unk>")


@names
@pytest.mark.parametrize("prompt", ["<image>\nwhat is it ?", "what is <image> here", "is it <image>"])
def test_the_user_may_place_the_picture(
    name: str, prompt: str, cases: Callable[[str], Case]
) -> None:
    case = cases(name)
    image = case.processor.image_token
    template = case.record.first.replace("{image}\n", "").replace("{image}", "")
    text = template.replace("{prompt}", prompt.replace("<image>", image))
    text = text.removeprefix(case.processor.tokenizer.bos_token or "")  # else it comes twice
    assert case.first(prompt) == case.rendered(text)


@names
@pytest.mark.parametrize("turn", ["first", "next"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_typed_control_tokens_stay_text(
    name: str, turn: str, cases: Callable[[str], Case], data: st.DataObject
) -> None:
    case = cases(name)
    tokenizer = case.processor.tokenizer
    control = [t for t in tokenizer.added_tokens_encoder if t not in ("<image>", "<unk>")]
    pieces = st.lists(st.sampled_from([*control, "what", " ", "</", "s>", "a"]), min_size=1)
    prompt = data.draw(pieces.map("".join).filter(str.strip))

    def controls(text: str) -> list[int]:
        ids = case.first(text) if turn == "first" else case.prompter.next_turn(text)[0].tolist()
        added = {tokenizer.added_tokens_encoder[t] for t in control} | {case.record.image_token_id}
        return [i for i in ids if i in added]

    try:
        assert controls(prompt) == controls("what")
    except InputError as error:
        assert name == "demo" and "control token" in str(error)


def test_a_typed_control_token_keeps_its_letters(cases: Callable[[str], Case]) -> None:
    for name in ("llama", "llama, legacy", "gpt-2", "qwen", "mistral, first"):
        prompter = cases(name).prompter
        _, ids = prompter.first_turn("what is </s> or <|im_end|> or <tool_call> here")
        assert "what is </s> or <|im_end|> or <tool_call> here" in prompter.decode(ids[0])
        ids = prompter.next_turn("</s> or <|im_end|>")
        assert "</s> or <|im_end|>" in prompter.decode(ids[0])


REFUSED = {
    "": "is empty",
    " \n": "is empty",
    "<image>": "is empty",
    "<image> or <image> ?": "2 times, there is one picture",
    "half a pair \ud83d": "no valid text",
}


@pytest.mark.parametrize("prompt", REFUSED)
def test_a_prompt_that_cannot_be_used_is_refused(
    prompt: str, cases: Callable[[str], Case]
) -> None:
    prompter = cases("demo").prompter
    with pytest.raises(InputError, match=REFUSED[prompt]):
        prompter.first_turn(prompt)
    with pytest.raises(InputError):
        prompter.next_turn(prompt)


def test_only_the_first_turn_may_place_a_picture(cases: Callable[[str], Case]) -> None:
    with pytest.raises(InputError, match="only the first prompt may hold <image>"):
        cases("demo").prompter.next_turn("and <image> ?")


@names
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_pieces_are_the_text(
    name: str, cases: Callable[[str], Case], data: st.DataObject
) -> None:
    case = cases(name)
    tokenizer = case.processor.tokenizer
    written = tokenizer.encode(data.draw(texts | st.text("aé女👩 \n", max_size=9)))
    random = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=20))
    ids = data.draw(st.sampled_from([written, random, random + written + random]))
    pieces = list(case.prompter.pieces(iter(ids)))
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(pieces) == case.prompter.decode(ids) == text
    assert "" not in pieces
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)


def test_pieces_come_as_soon_as_they_can(cases: Callable[[str], Case]) -> None:
    for name in ("llama", "gpt-2", "demo"):
        case = cases(name)
        ids = case.processor.tokenizer.encode("what color is it", add_special_tokens=False)
        arrived: list[int] = []
        stream = case.prompter.pieces(arrived.append(i) or i for i in ids)  # type: ignore[func-returns-value]
        for piece in stream:
            assert case.prompter.decode(arrived).endswith(piece)
        assert len(list(case.prompter.pieces(ids))) == len(ids)


def test_a_character_of_many_bytes_comes_whole(cases: Callable[[str], Case]) -> None:
    for name in ("llama", "gpt-2"):
        case = cases(name)
        ids = case.processor.tokenizer.encode("a👩b", add_special_tokens=False)
        assert len(ids) > 5
        assert [p for p in case.prompter.pieces(ids) if p.strip("ab")] in (["👩"], ["👩b"])


def test_the_record_of_llava(cases: Callable[[str], Case]) -> None:
    record = cases("llama").record
    assert record.first == "USER: {image}\n{prompt} ASSISTANT:"
    assert record.next == " USER: {prompt} ASSISTANT:"
    assert record.eos_token_ids == (2,) and record.system == ""
    assert record.add_special_tokens and not cases("mistral").record.add_special_tokens
    assert cases("mistral").record.next == "</s>[INST] {prompt} [/INST]"


def test_contents_may_be_strings(tmp_path: Path) -> None:
    processor, config, _ = built(byte_level(), STRINGS)
    record = prompts.text_record(processor, config)
    assert record.first == "### user: {image}\n{prompt}\n### assistant:"
    assert record.next == "\n### user: {prompt}\n### assistant:"
    assert record.eos_token_ids == (processor.tokenizer.eos_token_id,)


def test_a_tokenizer_alone_will_do() -> None:
    processor, config, _ = built(byte_level(), None)
    processor.tokenizer.chat_template = LLAVA
    record = prompts.text_record(processor.tokenizer, config)
    assert record.first == "USER: {image}\n{prompt} ASSISTANT:"
    assert record == prompts.text_record(processor, config)


def test_without_a_template_llava_gets_its_own() -> None:
    processor, config, _ = built(transformers_llama(), None)
    record = prompts.text_record(processor, config)
    assert record.first == "USER: {image}\n{prompt} ASSISTANT:"
    assert record.next == "</s>USER: {prompt} ASSISTANT:"
    assert "no chat template" in prompts.notes(processor, config)[0]
    config.model_type = "llava_next"
    with pytest.raises(ModelError, match="has no chat template"):
        prompts.text_record(processor, config)


def test_templates_that_cannot_be_frozen_are_refused() -> None:
    for template, message in [
        ("{{ messages[0]['role'] }}", "does not show one <image>"),
        ("{{ messages | length }} " + CHATML.replace("<|image_pad|>", "<image>"), "rewrites"),
    ]:
        processor, config, _ = built(byte_level(), template)
        with pytest.raises(ModelError, match=message):
            prompts.text_record(processor, config)


def test_an_image_token_that_is_no_token_is_refused() -> None:
    processor, config, _ = built(byte_level(), LLAVA)
    for number in (None, 10**6):
        config.image_token_id = number
        with pytest.raises(ModelError, match="image token"):
            prompts.text_record(processor, config)


def test_the_notes_say_what_is_left_out(cases: Callable[[str], Case]) -> None:
    assert prompts.notes(*demo()) == ()
    processor, config, _ = built(byte_level(), CHATML, "<|image_pad|>")
    assert "what the template puts around" in prompts.notes(processor, config)[0]
    trimmed = LLAVA.replace("content['text']", "content['text'] | trim")
    processor, config, _ = built(byte_level(), trimmed)
    found = prompts.notes(processor, config, GenerationConfig(repetition_penalty=1.2, num_beams=1))
    assert [note.split()[:3] for note in found] == [
        ["the", "chat", "template"],
        ["generation", "setting", "repetition_penalty"],
    ]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (GenerationConfig(), Sampling()),
        (GenerationConfig(do_sample=True), Sampling(temperature=1.0, top_k=50)),
        (
            GenerationConfig(do_sample=True, temperature=0.2, top_k=0, top_p=0.9, max_new_tokens=9),
            Sampling(temperature=0.2, top_p=0.9, max_new_tokens=9),
        ),
    ],
)
def test_the_defaults_of_generation_are_sampling(given: Any, wanted: Sampling) -> None:
    processor, config, _ = built(byte_level(), LLAVA)
    record = prompts.text_record(processor, config, given)
    assert Sampling(**record.generation) == wanted


def test_a_bundle_whose_parts_do_not_fit_is_refused(
    cases: Callable[[str], Case], tmp_path: Path
) -> None:
    record = cases("demo").record
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
